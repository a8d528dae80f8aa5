"""The configuration of a training run; every field is a flag of facedist.train.

`TrainConfig` inherits its groups of fields: the run, its input, its phases and
optimizer, its margin head and its metric loss. `resolve` fills in the defaults that
depend on other flags.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from facedist import config, errors
from facedist.config import lookup, setting
from facedist.models.heads.class_weights import PIECE_ROWS
from facedist.models.heads.margins import MARGINS, AdaFace, MagFace, Margin
from facedist.models.triplet_loss import TRIPLET_LOSSES
from facedist.training import sharded_optimizers

STRATEGIES = ("one", "mirrored", "multiworker")
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")


@dataclasses.dataclass(frozen=True)
class RunSettings:
  """Where a run reads and writes, on which devices, and the network it trains."""

  data_dir: str | None = setting(
    None,
    heading="The run",
    help="Folder of shards with manifest.json, or gs://.",
    may_change=True,
    path=True,
  )
  workdir: str | None = setting(
    None,
    help="Folder of this run, or gs://: config, checkpoints, logs. All workers see it.",
    may_change=True,
    path=True,
  )
  strategy: str = setting(
    "one",
    help="Train on one device, on all devices of this machine, or on all workers of "
    "the cluster.",
    choices=STRATEGIES,
    may_change=True,
  )
  communication: str = setting(
    "auto",
    help="Collectives between workers; auto is nccl on GPUs and ring elsewhere.",
    choices=("auto", "nccl", "ring"),
    may_change=True,
  )
  all_reduce_mb: float | None = setting(
    None,
    help="Megabytes of gradients that are sent together between workers, while the "
    "gradients of earlier layers are still computed. Not given: 25 with nccl and "
    "4 with ring; 0 sends all at the end.",
    at_least=0.0,
    may_change=True,
  )
  policy: str = setting(
    "float32", help="Precision of the backbone's computation.", choices=POLICIES
  )
  seed: int = setting(
    0, help="Seed of weights, sample order and augmentation.", at_least=0
  )
  global_batch: int = setting(
    512, help="Images per step, over all replicas.", at_least=1, at_most=2**24
  )
  jit_compile: str = setting(
    "auto",
    help="Compile each replica's forward and backward pass with XLA: the same losses, "
    "to rounding. auto is off, since no gain has been measured on a GPU yet.",
    choices=("off", "on", "auto"),
    may_change=True,
  )
  accumulate_steps: int = setting(
    1,
    help="Micro-batches into which a replica's part of a batch is split, computed one "
    "after another: the same update in less memory.",
    at_least=1,
    may_change=True,
  )

  backbone: str = setting(
    "resnet50",
    heading="The network",
    help="Network before the embedding layer: resnet50, iresnet18, iresnet34, "
    "iresnet50, iresnet100, mobilefacenet, vgg8 or tinynet.",
  )
  backbone_weights: str = setting(
    "imagenet",
    help="Initial weights of the network: imagenet, none (random), a Keras .h5 or "
    ".keras FILE, a workdir or one of its checkpoints, or the .pt, .pth, .ckpt or "
    ".safetensors state dict of an arcface_torch IResNet.",
    path=True,
  )
  freeze_until: str | None = setting(
    None, help="The backbone's layers up to and including this one are not trained."
  )
  embedding_size: int = setting(
    512, help="Number of floats in an embedding.", at_least=2, at_most=65_536
  )
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
    help="Fraction of features dropped before the embedding layer; not given: 0.4 for "
    "iresnets, 0.5 for vgg8, else 0.",
    at_least=0.0,
    at_most=0.9,
  )
  batch_norm_momentum: float = setting(
    0.99,
    help="Momentum of batch norm's moving averages; 0.9 for runs of a few hundred "
    "steps.",
    at_least=0.0,
    at_most=0.9999,
  )
  sync_batch_norm: bool = setting(
    False,
    help="Whether batch norm uses the statistics of the global batch in training.",
  )


READ_MODES = ("stage", "stream")


@dataclasses.dataclass(frozen=True)
class InputSettings:
  """How shards are read: the order of records, the cache, and bad records."""

  input_threads: int = setting(
    0,
    heading="Input",
    help="Threads that decode; 0: one per core.",
    at_least=0,
    at_most=1024,
    may_change=True,
  )
  read_mode: str = setting(
    "stage",
    help="stage copies the shards of a bucket to --cache_dir; stream reads them in "
    "place, each byte once per epoch and by one worker.",
    choices=READ_MODES,
    may_change=True,
  )
  shuffle_block: int = setting(
    1,
    help="Number of neighbouring records that are shuffled as one block and fetched by "
    "one request; 1 shuffles single records. stream needs more, such as 256.",
    at_least=1,
  )
  shuffle_window: int = setting(
    4, help="Blocks among which a stream mixes its records.", at_least=1
  )
  streams: int = setting(
    64,
    help="Streams of blocks that share the global batch; with --shuffle_block. Use a "
    "multiple of every number of workers that this run may have.",
    at_least=1,
    at_most=65_536,
  )
  stream_memory_mb: int = setting(
    1024,
    help="Memory of a worker for reading ahead with --read_mode=stream, in MiB.",
    at_least=1,
    may_change=True,
  )
  stream_requests: int = setting(
    16,
    help="Requests that a worker has in progress at a time with --read_mode=stream.",
    at_least=1,
    at_most=1024,
    may_change=True,
  )
  cache_dir: str = setting(
    "/tmp/facedist-cache",
    help="Folder on a local disk for shards of a bucket, shared by the processes of a "
    "host.",
    may_change=True,
    on_disk=True,
  )
  cache_gb: float = setting(
    0.0,
    help="Largest size of --cache_dir, in GB (1e9 bytes); the least recently used "
    "shards are removed. 0: no limit.",
    at_least=0.0,
    may_change=True,
  )
  verify_crc: bool = setting(
    True, help="Whether every record's CRC is checked as it is read.", may_change=True
  )
  on_bad_record: str = setting(
    "fail",
    help="On a corrupt record: end the run, or replace it by another record of the "
    "same epoch, the same one on every worker (skip).",
    choices=("fail", "skip"),
    may_change=True,
  )
  max_bad_records: int = setting(
    100,
    help="Corrupt records per epoch that --on_bad_record=skip replaces; one more ends "
    "the run.",
    at_least=0,
    may_change=True,
  )


SCHEDULES = ("cosine", "step", "polynomial")

DEFAULTS: dict[str, dict[str, float]] = {
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
"""The hyperparameters of each optimizer, by flag, with their defaults."""

SLOTS = {"sgd": 1, "adamw": 2, "lamb": 2}
"""Values that each optimizer keeps for every weight."""

_HYPERPARAMETERS = sorted({name for defaults in DEFAULTS.values() for name in defaults})


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """The length and learning rate of each phase, and the optimizer."""

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
    "cosine", help="Decay of the learning rate in the head phase.", choices=SCHEDULES
  )
  full_epochs: float = setting(
    20.0, help="Epochs of the full phase: everything trains.", at_least=0.0
  )
  full_rate: float | None = setting(
    None,
    help="Peak learning rate of the full phase; not given: the default of --head_rate.",
    at_least=0.0,
  )
  full_warmup_epochs: float = setting(
    1.0, help="Epochs of linear warm-up at the start of the full phase.", at_least=0.0
  )
  full_schedule: str = setting(
    "cosine", help="Decay of the learning rate in the full phase.", choices=SCHEDULES
  )
  backbone_rate_factor: float = setting(
    1.0,
    help="The backbone's learning rate divided by the head's, in the full phase.",
    at_least=0.0,
  )
  rate_batch: int = setting(
    0,
    help="The global batch for which both learning rates are given: with another "
    "--global_batch they are scaled linearly. 0: no scaling.",
    at_least=0,
  )
  final_rate_fraction: float = setting(
    0.0,
    help="Learning rate at the end of a phase divided by its peak.",
    at_least=0.0,
    at_most=1.0,
  )
  step_boundaries: str = setting(
    "0.5,0.75,0.9", help="Where schedule=step decays, as fractions of the phase."
  )
  step_factor: float = setting(
    0.1,
    help="Factor by which schedule=step multiplies the learning rate.",
    at_least=0.0,
  )
  polynomial_power: float = setting(
    2.0, help="Power of schedule=polynomial.", at_least=0.1
  )

  optimizer: str = setting(
    "sgd",
    heading="The optimizer",
    help=f"What makes an update of a gradient: {', '.join(DEFAULTS)} "
    "(docs/optimisers.md).",
  )
  weight_decay: float | None = setting(
    None,
    help="Decay of kernels and class weights: sgd adds it to the gradient (L2); adamw "
    "and lamb subtract it, times the learning rate, from the weights (decoupled). "
    "Not given: 0.0005 for sgd, 0.1 for adamw, 0.01 for lamb.",
    at_least=0.0,
  )
  clip_norm: float = setting(
    0.0, help="Largest global norm of the gradient; 0: no clipping.", at_least=0.0
  )
  momentum: float | None = setting(
    None, help="Momentum of sgd; not given: 0.9.", at_least=0.0, at_most=0.999
  )
  nesterov: bool = setting(False, help="Whether sgd uses Nesterov momentum.")
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
    help="Number that adamw and lamb add to the root of that mean; not given: 1e-8 for "
    "adamw, 1e-6 for lamb.",
    at_least=1e-12,
  )
  ema_decay: float = setting(
    0.0,
    help="Decay per step of an exponential moving average of the network's weights, "
    "such as 0.999; 0: none. evaluate and embed use the average with "
    "--weights=ema.",
    at_least=0.0,
    at_most=0.999999,
  )


AnyOptimizerSettings = TypeVar("AnyOptimizerSettings", bound=OptimizerSettings)


def with_default_hyperparameters(
  settings: AnyOptimizerSettings,
) -> AnyOptimizerSettings:
  """Fills in the optimizer's defaults for the flags that were not given.

  Raises:
    errors.UsageError: There is no such optimizer, or it has no such hyperparameter.
  """
  defaults = lookup(DEFAULTS, settings.optimizer, "optimizer")
  for flag in _HYPERPARAMETERS:
    if getattr(settings, flag) is not None and flag not in defaults:
      raise errors.UsageError(
        f"--{flag}={getattr(settings, flag)} does not belong to --optimizer="
        f"{settings.optimizer}, which has "
        f"{', '.join(f'--{name}' for name in defaults)}; leave it out."
      )
  if settings.nesterov and "momentum" not in defaults:
    raise errors.UsageError(
      f"--nesterov is a kind of momentum, which --optimizer={settings.optimizer} does "
      "not have; leave it out, or take --optimizer=sgd."
    )
  missing: dict[str, Any] = {
    name: defaults[name] for name in defaults if getattr(settings, name) is None
  }
  return dataclasses.replace(settings, **missing)


def hyperparameters(settings: OptimizerSettings) -> dict[str, float]:
  """Returns the optimizer's hyperparameters by their flags, of a resolved config."""
  return {name: getattr(settings, name) for name in DEFAULTS[settings.optimizer]}


def peak_rates(
  settings: OptimizerSettings, *, global_batch: int
) -> tuple[float, float]:
  """Returns the peak learning rates of the head phase and of the full phase.

  With --rate_batch they are proportional to the batch (arXiv:1706.02677, section 2).
  """
  factor = global_batch / settings.rate_batch if settings.rate_batch else 1.0
  found = hyperparameters(settings)
  return factor * found["head_rate"], factor * found["full_rate"]


SHARDINGS = ("replicated", "sharded", "sampled")
NO_HEAD = "none"
_DEFAULT_SAMPLE_RATE = 0.1


@dataclasses.dataclass(frozen=True)
class HeadSettings:
  """Which head, and its hyperparameters; docs/losses.md says when to use which."""

  head: str = setting(
    "cosface",
    heading="The head",
    help=f"Margin head: {', '.join(MARGINS)}; or none: no class weights, and "
    "--metric_loss alone (docs/losses.md).",
  )
  margin: float | None = setting(
    None,
    help="Margin, in the head's unit: cosine for cosface, a factor of the angle for "
    "sphereface and combined (m1), else radians; not given: the head's default.",
    at_least=0.0,
  )
  margin2: float | None = setting(
    None,
    help="Second margin in radians: combined's m2, magface's at --norm_high.",
    at_least=0.0,
  )
  margin3: float | None = setting(
    None, help="Third margin, in cosine units: combined's m3.", at_least=0.0
  )
  scale: float = setting(
    64.0, help="Factor of the cosines in the softmax.", at_least=1.0
  )
  sub_centres: int | None = setting(
    None,
    help="Class weights per identity, of which the nearest is used; not given: 3 for "
    "subcentre_arcface, 1 for others.",
    at_least=1,
    at_most=64,
  )
  norm_low: float = setting(
    MagFace.min_norm,
    help="magface: norm of embeddings with its smallest margin.",
    at_least=1e-3,
  )
  norm_high: float = setting(
    MagFace.max_norm,
    help="magface: norm of embeddings with its largest margin.",
    at_least=1e-3,
  )
  norm_weight: float = setting(
    MagFace.penalty_weight,
    help="magface: weight of its penalty on small norms.",
    at_least=0.0,
  )
  norm_concentration: float = setting(
    AdaFace.concentration,
    help="adaface: h. The score of an embedding is h times the number of standard "
    "deviations that its norm is above the mean.",
    at_least=0.0,
  )
  head_momentum: float = setting(
    AdaFace.momentum,
    help="adaface and curricularface: weight of the running statistics against a new "
    "batch.",
    at_least=0.0,
    at_most=1.0,
  )
  head_sharding: str = setting(
    "replicated",
    help="Where the class weights are. replicated: all of them on every replica, best "
    "up to some 100,000 identities. sharded: every replica holds one part of them "
    "and of their optimizer slots, with the same result; memory and work of a "
    "replica fall with the number of replicas, and the bytes sent per step depend "
    "on the batch instead of the identities. sampled: sharded, and a step trains "
    "the batch's identities and a fraction of the others (Partial FC), for "
    "millions of identities.",
    choices=SHARDINGS,
  )
  head_sample_rate: float | None = setting(
    None,
    help="Fraction of the other identities in a step of --head_sharding=sampled, above "
    "0; not given: 0.1.",
    at_least=0.0,
    at_most=1.0,
  )
  head_shard_rows: int = setting(
    PIECE_ROWS,
    help="Identities of a sharded head that are saved, restored or initialised at a "
    "time.",
    at_least=1,
    may_change=True,
  )


AnyHeadSettings = TypeVar("AnyHeadSettings", bound=HeadSettings)


def with_default_margins(settings: AnyHeadSettings) -> AnyHeadSettings:
  """Fills in the head's defaults for the flags that were not given.

  Raises:
    errors.UsageError: There is no such head, it has no such hyperparameter, or a value
      makes no sense with it.
  """
  margin = lookup(MARGINS | {NO_HEAD: None}, settings.head, "head")
  defaults: dict[str, Any] = margin.defaults() if margin else {}
  _refuse_others(settings, tuple(defaults))
  if margin:
    defaults["sub_centres"] = margin.default_sub_centres
  filled = dataclasses.replace(
    settings,
    **{
      name: value for name, value in defaults.items() if getattr(settings, name) is None
    },
  )
  if filled.head == "sphereface" and filled.margin is not None and filled.margin < 1:
    raise errors.UsageError(
      f"--margin={filled.margin} would make the angle smaller; sphereface multiplies "
      "it: give at least 1, such as 1.35."
    )
  filled = dataclasses.replace(filled, head_sample_rate=_sample_rate(filled))
  if filled.norm_low >= filled.norm_high:
    raise errors.UsageError(
      f"--norm_low={filled.norm_low} must be below --norm_high={filled.norm_high}; "
      "lower the first or raise the second."
    )
  return filled


def _refuse_others(settings: HeadSettings, own: Sequence[str]) -> None:
  """Raises UsageError for a hyperparameter that was given and is not the head's own.

  The flag's default is accepted with every head: config.json of every run holds it.
  """
  defaults = HeadSettings()
  for flag in sorted(
    {flag for margin in MARGINS.values() for flag in margin.defaults()}
  ):
    value = getattr(settings, flag)
    if flag in own or value is None or value == getattr(defaults, flag):
      continue
    raise errors.UsageError(
      f"--{flag}={value} does not belong to --head={settings.head}, which has "
      f"{', '.join(f'--{name}' for name in own) or 'no margin'}; leave it out."
    )


def _sample_rate(settings: HeadSettings) -> float | None:
  """Returns the fraction of identities in a step; none where it is all of them."""
  given = settings.head_sample_rate
  if settings.head_sharding == "sampled":
    if given == 0.0:
      raise errors.UsageError(
        "--head_sample_rate=0.0 leaves no other identities to compare with; "
        f"give a fraction above 0, such as {_DEFAULT_SAMPLE_RATE}."
      )
    return _DEFAULT_SAMPLE_RATE if given is None else given
  if given is not None:
    raise errors.UsageError(
      f"--head_sample_rate={given} belongs to --head_sharding=sampled, not "
      f"{settings.head_sharding}; leave it out, or give --head_sharding=sampled."
    )
  return None


def margin_of(settings: HeadSettings) -> Margin:
  """Returns the margin head that resolved settings describe."""
  return MARGINS[settings.head].from_flags(dataclasses.asdict(settings))


NO_LOSS = "none"
SAMPLERS = ("records", "identities")
_IMAGES_PER_IDENTITY = 4  # as in the batches of arXiv:1703.07737


@dataclasses.dataclass(frozen=True)
class MetricSettings:
  """The metric loss, and how batches are sampled for it (docs/losses.md)."""

  metric_loss: str = setting(
    NO_LOSS,
    heading="Metric learning",
    help="Loss of triplets of the global batch, added to the head's loss; with "
    "--head=none it is the only loss.",
    choices=(NO_LOSS, *TRIPLET_LOSSES),
  )
  metric_weight: float = setting(1.0, help="Factor of the metric loss.", at_least=0.0)
  metric_margin: float = setting(
    0.2,
    help="How much farther the negative of a triplet must be than the positive: in "
    "squared distance of unit vectors for triplet_semihard, which is at most 4; in "
    "distance for triplet_hard, at most 2.",
    at_least=0.0,
    at_most=4.0,
  )
  sampler: str = setting(
    "records",
    help="What a batch is made of: records, each once per epoch; or identities, with "
    "the same number of images of each.",
    choices=SAMPLERS,
  )
  identities_per_batch: int | None = setting(
    None,
    help="Identities in a batch with --sampler=identities; divides --global_batch. Not "
    "given: a quarter of it, so four images of each.",
    at_least=2,
  )


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
    0.0,
    help="Largest fraction of a side that a crop removes.",
    at_least=0.0,
    at_most=0.5,
  )
  augment_color: float = setting(
    0.0,
    help="Strength of brightness, contrast and saturation changes.",
    at_least=0.0,
    at_most=1.0,
  )
  augment_cutout: float = setting(
    0.0,
    help="Side of a grey square that covers a random place of each image, as a "
    "fraction of the image's side (cutout), to an even number of pixels; 0 for none.",
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
    help="Steps between validation passes; 0: at the end only.",
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
    help="End after this step, even if the schedule is longer; 0: end with the "
    "schedule.",
    at_least=0,
    may_change=True,
  )
  deterministic: bool = setting(
    False, help="Bit-identical results from run to run; slower.", may_change=True
  )
  on_nan: str = setting(
    "stop",
    heading="When things go wrong",
    help="On a loss or gradient that is not finite: stop, or rewind to the previous "
    "checkpoint and skip the batches since.",
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
    help="Seconds in which to save and end after SIGTERM or SIGUSR1; keep it below the "
    "scheduler's own (30 on Kubernetes).",
    at_least=0.1,
    may_change=True,
  )
  start_timeout: float = setting(
    0.0,
    help="Seconds to wait for all workers to start; 0: the value of --peer_timeout.",
    at_least=0.0,
    may_change=True,
  )
  peer_timeout: float = setting(
    60.0,
    help="Seconds without a heartbeat after which another worker counts as lost.",
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
    help="File that is touched while this worker is alive, for liveness probes.",
    may_change=True,
    on_disk=True,
  )
  dry_run: bool = setting(
    False,
    help="Check the flags, then train two steps of this config on random images, save, "
    "restore and embed. It needs neither data nor a download of ImageNet's "
    "weights.",
    may_change=True,
  )


AnyTrainConfig = TypeVar("AnyTrainConfig", bound=TrainConfig)


def resolve(settings: AnyTrainConfig) -> AnyTrainConfig:
  """Fills in the defaults that depend on other flags: of head, optimizer and sampler.

  A command's `main` calls it once; everything below takes the config as it returns it.

  Raises:
    errors.UsageError: There is no such head or optimizer, a number is none of its, or
      the two do not go together.
  """
  filled = with_default_hyperparameters(with_default_margins(settings))
  if filled.jit_compile == "auto":
    filled = dataclasses.replace(filled, jit_compile="off")
  if filled.jit_compile == "on" and filled.sync_batch_norm:
    raise errors.UsageError(
      "--jit_compile=on cannot compile the collectives of --sync_batch_norm; leave one "
      "of them out."
    )
  if filled.sampler == "identities" and filled.identities_per_batch is None:
    default = max(2, filled.global_batch // _IMAGES_PER_IDENTITY)
    filled = dataclasses.replace(filled, identities_per_batch=default)
  filled = dataclasses.replace(
    filled, start_timeout=filled.start_timeout or filled.peer_timeout
  )
  if filled.head_sharding != "replicated":
    sharded_optimizers.check_row_optimizer(filled.optimizer)
  return filled


def load_config(text: str, origin: str) -> TrainConfig:
  """Reads a config.json; errors.ConfigError names `origin` if it is none."""
  return config.from_json(TrainConfig, text, origin)
