"""Phases, rates and the optimizer of a training run: fields of its configuration."""

import dataclasses
from typing import Any, TypeVar

from facedist import errors
from facedist.config import lookup, setting

SCHEDULES = ("cosine", "step", "polynomial")

USUAL: dict[str, dict[str, float]] = {
  "sgd": {
    "head_rate": 0.1,
    "full_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
  },
  "adamw": {
    "head_rate": 1e-3,
    "full_rate": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-8,
    "weight_decay": 0.1,
  },
  "lamb": {
    "head_rate": 5e-3,
    "full_rate": 5e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-6,
    "weight_decay": 0.01,
  },
}
"""The numbers that each optimizer has, and what they are where none is given."""

SLOTS = {"sgd": 1, "adamw": 2, "lamb": 2}
"""Numbers that each optimizer keeps beside every weight."""

_NUMBERS = sorted({name for numbers in USUAL.values() for name in numbers})


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """How long each phase lasts, how its rate goes, and what an update is."""

  head_epochs: float = setting(
    1.0,
    heading="Phases and rates",
    help="Epochs of the head phase: backbone frozen.",
    at_least=0.0,
  )
  head_rate: float | None = setting(
    None,
    help="Peak learning rate of the head phase; not given: 0.1 for sgd, 0.001 for "
    "adamw, 0.005 for lamb.",
    at_least=0.0,
  )
  head_warmup_epochs: float = setting(
    0.0, help="Epochs of linear warm-up at the start of the head phase.", at_least=0.0
  )
  head_schedule: str = setting(
    "cosine", help="Decay of the rate in the head phase.", choices=SCHEDULES
  )
  full_epochs: float = setting(
    20.0, help="Epochs of the full phase: everything trains.", at_least=0.0
  )
  full_rate: float | None = setting(
    None,
    help="Peak learning rate of the full phase; not given: as for --head_rate.",
    at_least=0.0,
  )
  full_warmup_epochs: float = setting(
    1.0, help="Epochs of linear warm-up at the start of the full phase.", at_least=0.0
  )
  full_schedule: str = setting(
    "cosine", help="Decay of the rate in the full phase.", choices=SCHEDULES
  )
  backbone_rate_factor: float = setting(
    1.0,
    help="Backbone's rate over the head's, in the full phase.",
    at_least=0.0,
  )
  rate_batch: int = setting(
    0,
    help="The global batch that both rates are given for: with another --global_batch "
    "they are scaled linearly. 0: as they are.",
    at_least=0,
  )
  final_rate_fraction: float = setting(
    0.0, help="Rate at a phase's end over its peak.", at_least=0.0, at_most=1.0
  )
  step_boundaries: str = setting(
    "0.5,0.75,0.9", help="Where schedule=step decays, as shares of the phase."
  )
  step_factor: float = setting(
    0.1, help="What schedule=step multiplies the rate with.", at_least=0.0
  )
  polynomial_power: float = setting(
    2.0, help="Power of schedule=polynomial.", at_least=0.1
  )

  optimizer: str = setting(
    "sgd",
    heading="The optimizer",
    help=f"What makes an update of a gradient: {', '.join(USUAL)} "
    "(docs/optimisers.md). lamb needs tensorflow-addons.",
  )
  weight_decay: float | None = setting(
    None,
    help="Decay of kernels and class centres: sgd adds it to the gradient (L2); adamw "
    "and lamb take it, times the rate, off the weights (decoupled). Not given: 0.0005 "
    "for sgd, 0.1 for adamw, 0.01 for lamb.",
    at_least=0.0,
  )
  clip_norm: float = setting(
    0.0, help="Largest global norm of the gradient; 0 does not clip.", at_least=0.0
  )
  momentum: float | None = setting(
    None, help="Momentum of sgd; not given: 0.9.", at_least=0.0, at_most=0.999
  )
  nesterov: bool = setting(False, help="Whether sgd's momentum is Nesterov's.")
  beta1: float | None = setting(
    None,
    help="Decay of adamw's and lamb's mean of gradients; not given: 0.9.",
    at_least=0.0,
    at_most=0.9999,
  )
  beta2: float | None = setting(
    None,
    help="Decay of adamw's and lamb's mean of squared gradients; not given: 0.999.",
    at_least=0.0,
    at_most=0.99999,
  )
  epsilon: float | None = setting(
    None,
    help="What adamw and lamb add to the root of that mean; not given: 1e-8 for adamw, "
    "1e-6 for lamb.",
    at_least=1e-12,
  )
  ema_decay: float = setting(
    0.0,
    help="Decay a step of an exponential moving average of the network's weights, such "
    "as 0.999; 0: none. evaluate and embed take it with --weights=ema.",
    at_least=0.0,
    at_most=0.999999,
  )


Settings = TypeVar("Settings", bound=OptimizerSettings)


def with_usual_numbers(settings: Settings) -> Settings:
  """Fills in what was not given, so that a run keeps its numbers.

  Raises:
    errors.UsageError: There is no such optimizer, or it has no such number.
  """
  usual = lookup(USUAL, settings.optimizer, "optimizer")
  for flag in _NUMBERS:
    if getattr(settings, flag) is not None and flag not in usual:
      raise errors.UsageError(
        f"--{flag}={getattr(settings, flag)} is none of --optimizer="
        f"{settings.optimizer}'s numbers, which are "
        f"{', '.join(f'--{name}' for name in usual)}; leave it out."
      )
  if settings.nesterov and "momentum" not in usual:
    raise errors.UsageError(
      f"--nesterov is a kind of momentum, which --optimizer={settings.optimizer} does "
      "not have; leave it out, or take --optimizer=sgd."
    )
  missing: dict[str, Any] = {
    name: usual[name] for name in usual if getattr(settings, name) is None
  }
  return dataclasses.replace(settings, **missing)


def numbers(settings: OptimizerSettings) -> dict[str, float]:
  """Returns the optimizer's numbers by their flags, given or usual."""
  filled = with_usual_numbers(settings)
  return {name: getattr(filled, name) for name in USUAL[filled.optimizer]}


def peak_rates(
  settings: OptimizerSettings, *, global_batch: int
) -> tuple[float, float]:
  """Returns the peak rates of the head and the full phase.

  With --rate_batch they grow in proportion to the batch (arXiv:1706.02677, section 2).
  """
  factor = global_batch / settings.rate_batch if settings.rate_batch else 1.0
  found = numbers(settings)
  return factor * found["head_rate"], factor * found["full_rate"]
