"""Phases, rates and the optimizer of a training run: fields of its configuration."""

import dataclasses

from facedist.config import setting

SCHEDULES = ("cosine", "step", "polynomial")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """How long each phase lasts, how its rate goes, and what an update is."""

  head_epochs: float = setting(
    1.0,
    heading="Phases and rates",
    help="Epochs of the head phase: backbone frozen.",
    at_least=0.0,
  )
  head_rate: float = setting(0.1, help="Peak learning rate of the head phase.")
  head_warmup_epochs: float = setting(
    0.0, help="Epochs of linear warm-up at the start of the head phase.", at_least=0.0
  )
  head_schedule: str = setting(
    "cosine", help="Decay of the rate in the head phase.", choices=SCHEDULES
  )
  full_epochs: float = setting(
    20.0, help="Epochs of the full phase: everything trains.", at_least=0.0
  )
  full_rate: float = setting(0.1, help="Peak learning rate of the full phase.")
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
  final_rate_fraction: float = setting(
    0.0, help="Rate at a phase's end over its peak.", at_least=0.0, at_most=1.0
  )
  step_boundaries: str = setting(
    "0.5,0.75,0.9", help="Where schedule=step decays, as shares of the phase."
  )
  step_factor: float = setting(0.1, help="What schedule=step multiplies the rate with.")
  polynomial_power: float = setting(
    2.0, help="Power of schedule=polynomial.", at_least=0.1
  )
  momentum: float = setting(0.9, help="Momentum of SGD.", at_least=0.0, at_most=0.999)
  nesterov: bool = setting(False, help="Whether momentum is Nesterov's.")
  weight_decay: float = setting(
    5e-4, help="L2 coefficient on kernels and class centres.", at_least=0.0
  )
  clip_norm: float = setting(
    0.0, help="Largest global norm of the gradient; 0 does not clip.", at_least=0.0
  )
