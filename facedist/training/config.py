"""The configuration of a training run; every field is a flag of facedist.train."""

import dataclasses

from facedist import config
from facedist.config import setting
from facedist.training.head_settings import HeadSettings
from facedist.training.input_settings import InputSettings

STRATEGIES = ("one", "mirrored", "multiworker")
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")
SCHEDULES = ("cosine", "step", "polynomial")


@dataclasses.dataclass(frozen=True)
class TrainConfig(HeadSettings, InputSettings):
  """What is trained, on what, and how; saved as workdir/config.json."""

  data_dir: str | None = setting(
    None,
    heading="The run",
    help="Folder of shards with manifest.json, or gs://.",
    may_change=True,
  )
  workdir: str | None = setting(
    None,
    help="Folder of this run, or gs://: config, checkpoints, logs. All workers see it.",
    may_change=True,
  )
  strategy: str = setting(
    "one",
    help="one device, all devices of this machine, or all workers of the cluster.",
    choices=STRATEGIES,
    may_change=True,
  )
  communication: str = setting(
    "auto",
    help="Collectives between workers; auto is nccl on GPUs and ring elsewhere.",
    choices=("auto", "nccl", "ring"),
    may_change=True,
  )
  policy: str = setting(
    "float32", help="Precision of the backbone's computation.", choices=POLICIES
  )
  seed: int = setting(0, help="Seed of weights, sample order and augmentation.")
  global_batch: int = setting(512, help="Images a step, over all replicas.", at_least=1)

  backbone: str = setting(
    "resnet50",
    heading="The network",
    help="Network before the embedding layer: resnet50, iresnet18, iresnet34, "
    "iresnet50, iresnet100, mobilefacenet, vgg8 or tinynet.",
  )
  backbone_weights: str = setting(
    "imagenet",
    help="Where the network starts: imagenet, none (random), a Keras .h5 or .keras "
    "FILE, a workdir or one of its checkpoints, or the .pt, .pth or .safetensors state "
    "dict of an arcface_torch IResNet.",
  )
  freeze_until: str | None = setting(
    None, help="The backbone's layers up to this one do not train."
  )
  embedding_size: int = setting(512, help="Floats of an embedding.", at_least=2)
  pooling: str = setting(
    "auto",
    help="How the feature map becomes a vector before the embedding layer; auto is avg "
    "for resnet50 and tinynet, gdconv for mobilefacenet, e_type for the others.",
    choices=("auto", "avg", "flatten", "e_type", "gdconv"),
  )
  embedding_batch_norm: bool = setting(
    True, help="Whether batch norm follows the embedding layer."
  )
  dropout: float | None = setting(
    None,
    help="Share of features dropped before embedding; if not given, 0.4 for iresnets, "
    "0.5 for vgg8, else 0.",
    at_least=0.0,
    at_most=0.9,
  )
  batch_norm_momentum: float = setting(
    0.99,
    help="Momentum of batch norm's moving averages; 0.9 for runs of few hundred steps.",
    at_least=0.0,
    at_most=0.9999,
  )
  sync_batch_norm: bool = setting(
    False, help="Whether batch norm's statistics in training are the global batch's."
  )

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
  )
  dry_run: bool = setting(
    False,
    help="Two steps of this config on random images: train, save, restore, embed.",
    may_change=True,
  )


def load(text: str, origin: str) -> TrainConfig:
  """Reads a config.json; errors.ConfigError names `origin` if it is none."""
  return config.from_json(TrainConfig, text, origin)
