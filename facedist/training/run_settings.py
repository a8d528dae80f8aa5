"""What a training run is and which network it trains: fields of its configuration."""

import dataclasses

from facedist.config import setting

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
  all_reduce_mb: float | None = setting(
    None,
    help="Megabytes of gradients that travel together between workers, while earlier "
    "layers' are still computed; if not given, 25 with nccl and 4 with ring; 0 waits "
    "for all.",
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
    512, help="Images a step, over all replicas.", at_least=1, at_most=2**24
  )
  accumulate_steps: int = setting(
    1,
    help="Micro-batches that a replica's part of a batch comes in, one after another: "
    "the same update in less memory.",
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
    help="Where the network starts: imagenet, none (random), a Keras .h5 or .keras "
    "FILE, a workdir or one of its checkpoints, or the .pt, .pth, .ckpt or "
    ".safetensors state dict of an arcface_torch IResNet.",
    path=True,
  )
  freeze_until: str | None = setting(
    None, help="The backbone's layers up to this one do not train."
  )
  embedding_size: int = setting(
    512, help="Floats of an embedding.", at_least=2, at_most=65_536
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
