"""The configuration of a training run; every field is a flag of facedist.train."""

import dataclasses

from facedist import config
from facedist.config import setting
from facedist.training import head_settings, optimizer_settings, row_optimizers
from facedist.training.head_settings import HeadSettings
from facedist.training.input_settings import InputSettings
from facedist.training.metric_settings import MetricSettings
from facedist.training.optimizer_settings import OptimizerSettings
from facedist.training.run_settings import RunSettings


@dataclasses.dataclass(frozen=True)
class TrainConfig(
  OptimizerSettings, MetricSettings, HeadSettings, InputSettings, RunSettings
):
  """What is trained, on what, and how; saved as workdir/config.json.

  Fields, and so `--help`, have the order of the bases from last to first, then its own.
  """

  augment_flip: bool = setting(
    True, heading="Augmentation", help="Whether images are mirrored at random."
  )
  augment_crop: float = setting(
    0.0, help="Largest share of a side that a crop removes.", at_least=0.0, at_most=0.5
  )
  augment_color: float = setting(
    0.0,
    help="Strength of brightness, contrast and saturation changes.",
    at_least=0.0,
    at_most=1.0,
  )

  log_every_steps: int = setting(
    50,
    heading="Logs and checkpoints",
    help="Steps between log lines.",
    at_least=1,
    may_change=True,
  )
  validate_every_steps: int = setting(
    0,
    help="Steps between validation passes; 0: at end only.",
    at_least=0,
    may_change=True,
  )
  checkpoint_every_steps: int = setting(
    1000, help="Steps between checkpoints.", at_least=1, may_change=True
  )
  keep_last: int = setting(
    3, help="Newest checkpoints that are kept.", at_least=1, may_change=True
  )
  keep_every: int = setting(
    0,
    help="Checkpoints at multiples of so many steps are kept for good; 0: none.",
    at_least=0,
    may_change=True,
  )
  stop_after_steps: int = setting(
    0,
    help="End after this step though the schedule goes on; 0: at its end.",
    at_least=0,
    may_change=True,
  )
  deterministic: bool = setting(
    False, help="Bit-identical results from run to run, slower.", may_change=True
  )
  on_nan: str = setting(
    "stop",
    heading="When things go wrong",
    help="On a loss or gradient that is not finite: stop, or rewind to the checkpoint "
    "before and go on past the batches since.",
    choices=("stop", "rewind"),
    may_change=True,
  )
  max_rewinds: int = setting(
    3, help="Rewinds of a run before it stops.", at_least=0, may_change=True
  )
  divergence_check_steps: int = setting(
    1000,
    help="Steps between comparisons of the replicas' weights; 0: never.",
    at_least=0,
    may_change=True,
  )
  grace_seconds: float = setting(
    25.0,
    help="Seconds to save and end in after SIGTERM or SIGUSR1; keep it below the "
    "scheduler's own (30 on Kubernetes).",
    at_least=0.1,
    may_change=True,
  )
  start_timeout: float = setting(
    0.0,
    help="Seconds to wait for all workers to start; 0: as --peer_timeout.",
    at_least=0.0,
    may_change=True,
  )
  peer_timeout: float = setting(
    60.0,
    help="Seconds of silence after which another worker counts as lost.",
    at_least=1.0,
    may_change=True,
  )
  step_timeout: float = setting(
    900.0,
    help="Seconds without progress, compilation included, after which a worker counts "
    "as stuck.",
    at_least=1.0,
    may_change=True,
  )
  heartbeat_file: str | None = setting(
    None,
    help="File that is touched as long as this worker is alive, for liveness probes.",
    may_change=True,
    on_disk=True,
  )
  dry_run: bool = setting(
    False,
    help="Check the flags, then train two steps of this config on random images, save, "
    "restore and embed; without data, and without a download of ImageNet's weights.",
    may_change=True,
  )


def with_usual_values(settings: TrainConfig) -> TrainConfig:
  """Fills in what the head and the optimizer usually have where nothing was given.

  Raises:
    errors.UsageError: There is no such head or optimizer, a number is none of its, or
      the two do not go together.
  """
  filled = optimizer_settings.with_usual_numbers(
    head_settings.with_usual_margins(settings)
  )
  if filled.head_sharding != "replicated":
    row_optimizers.check(filled.optimizer)
  return filled


def load(text: str, origin: str) -> TrainConfig:
  """Reads a config.json; errors.ConfigError names `origin` if it is none."""
  return config.from_json(TrainConfig, text, origin)
