"""Rebuilds a trained network from a workdir, for evaluation, embedding and export.

`load_network` builds the network of config.json and restores a checkpoint into it.
`EmbeddingSettings` has the flags that embed and export share: which weights of the
checkpoint to use, and what to do with raw embeddings.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from facedist import errors, storage
from facedist.config import setting
from facedist.data.shards import manifest
from facedist.data.verification_set import VerificationSet
from facedist.distributed import strategies
from facedist.models.backbones import registry
from facedist.training import ema
from facedist.training.checkpoint import checkpoints
from facedist.training.config import TrainConfig
from facedist.training.train_state import network_from_config

CHECKPOINT_HELP = (
  "Step or path of the checkpoint, or best, which facedist.evaluate --keep_best keeps; "
  "the newest if not given."
)
WEIGHTS = ("auto", "trained", "ema")
WEIGHTS_HELP = (
  "Which weights of the checkpoint: as trained, or their moving average (ema); auto is "
  "ema if training has --ema_decay."
)

STRICT_ALIGNMENT_HELP = (
  "Whether to refuse data that were aligned in another way than the training data; "
  "otherwise the difference is a warning."
)


class InferenceNetwork:
  """A network with the weights of one checkpoint.

  Attributes:
    weights: Which weights: trained, or ema, their moving average.
    step: Step of the checkpoint whose weights are loaded.
    name: Backbone, embedding size and checkpoint, such as resnet50-512@step-00000100;
      followed by -ema for the moving average.
    image_size: Height and width of its input in pixels.
    embedding_size: Floats of an embedding.
    policy: Precision of its computation.
    pixel_normalization: What its first layer makes of pixels in [0, 255].
    network: The network itself; `embed` is its `embed`, compiled.
  """

  def __init__(
    self,
    workdir: str,
    checkpoint: checkpoints.Checkpoint,
    *,
    weights: str,
    strategy: tf.distribute.Strategy | None = None,
    policy: str | None = None,
  ) -> None:
    settings = checkpoints.load_config(workdir)
    if policy is not None:
      settings = dataclasses.replace(settings, policy=policy)
    self.weights = choose_weights(settings, weights)
    self.image_size = int(checkpoint.marker()["image_size"])
    self.embedding_size = settings.embedding_size
    self.policy = settings.policy
    self._kind = f"{settings.backbone}-{settings.embedding_size}"
    with contextlib.nullcontext() if strategy is None else strategy.scope():
      self.network = network_from_config(settings, self.image_size)
    backbone = registry.BACKBONES[settings.backbone]
    self.pixel_normalization = backbone.pixel_normalization
    function = tf.function(self.network.embed, autograph=False, reduce_retracing=True)
    self.embed = (
      function if strategy is None else functools.partial(_split, function, strategy)
    )
    self.restore(checkpoint)

  @property
  def variables(self) -> list[tf.Variable]:
    """The variables that an embedding depends on."""
    return ema.weights(self.network)

  def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
    """Loads another checkpoint's weights, without compiling again.

    Raises:
      errors.DataError: The files are corrupt or of another network.
    """
    if self.weights == "ema":
      average = ema.in_place_of(self.network)
      state = tf.train.Checkpoint(average=average)
    else:
      state = tf.train.Checkpoint(network=self.network)
    checkpoints.restore(state, checkpoint, is_whole=False)
    self.step = checkpoint.step
    suffix = "-ema" if self.weights == "ema" else ""
    self.name = f"{self._kind}@{checkpoint.name}{suffix}"


def _split(
  function: Callable[[tf.Tensor], tf.Tensor],
  strategy: tf.distribute.Strategy,
  images: np.ndarray,
) -> np.ndarray:
  """Embeds a batch on all replicas of this process."""
  first = min(strategies.places(strategy))
  parts = np.split(images, strategies.local_replicas(strategy))
  batch = strategy.experimental_distribute_values_from_function(
    lambda context: parts[context.replica_id_in_sync_group - first]
  )
  results = strategy.run(function, args=(batch,))
  return np.concatenate(strategy.experimental_local_results(results))


def choose_weights(settings: TrainConfig, wanted: str) -> str:
  """Returns which weights of a run `--weights` selects: trained or ema.

  auto selects the moving average if the run keeps one.

  Raises:
    errors.UsageError: --weights=ema, but the run keeps no average.
  """
  if wanted == "auto":
    return "ema" if settings.ema_decay else "trained"
  if wanted == "ema" and not settings.ema_decay:
    raise errors.UsageError(
      f"--weights=ema, but the run in {settings.workdir} keeps no average of its "
      "weights; use --weights=trained, or train with --ema_decay=0.999."
    )
  return wanted


def load_network(
  workdir: str,
  checkpoint: checkpoints.Checkpoint,
  *,
  weights: str = "auto",
  strategy: tf.distribute.Strategy | None = None,
  policy: str | None = None,
) -> InferenceNetwork:
  """Rebuilds the network of a run with the weights of `checkpoint`.

  `Network.embed` takes uint8 or float32[n, S, S, 3] RGB pixels in [0, 255] and
  returns raw float32[n, embedding], in inference mode.

  Args:
    workdir: The run's folder.
    checkpoint: A complete checkpoint of it.
    weights: One of WEIGHTS.
    strategy: Embeds on all of its replicas in this process; each gets an equal part of
      a batch, whose size must be a multiple of their number. None: one device.
    policy: Keras' name of the precision; None for the run's.

  Raises:
    errors.DataError: workdir or checkpoint is incomplete, corrupt or of another run.
    errors.ConfigError: config.json is not of this version.
    errors.UsageError: --weights=ema, but the run keeps no average of its weights.
  """
  return InferenceNetwork(
    workdir, checkpoint, weights=weights, strategy=strategy, policy=policy
  )


def check_alignment(
  marker: Mapping[str, Any],
  alignment: str | None,
  *,
  data: str,
  is_strict: bool,
) -> None:
  """Warns of data that were aligned in another way than the training data.

  Args:
    marker: Of a checkpoint; it has the alignment of the training data.
    alignment: `Manifest.aligned_by` of the data.
    data: A name of the data, which begins the message.
    is_strict: Whether to raise an error instead.

  Raises:
    errors.DataError: The alignments differ, and `is_strict`.
  """
  trained = marker.get("alignment")
  if not manifest.alignments_differ(trained, alignment):
    return
  text = (
    f"{data} has images aligned by {alignment}, but the network was trained on images "
    f"aligned by {trained}, so its scores will be too low, unless they were aligned so "
    "before; build the data with the same alignment"
  )
  if is_strict:
    raise errors.DataError(f"{text}, or leave out --strict_alignment.")
  logging.warning("%s.", text)


def check_verification_sets(
  marker: Mapping[str, Any],
  sets: Sequence[VerificationSet],
  *,
  is_strict: bool = False,
) -> None:
  """Refuses sets of another image size; warns of another alignment.

  Args:
    marker: Of a checkpoint; it has the size and the alignment of the training data.
    sets: Those of --verification_data.
    is_strict: Whether another alignment is an error too.

  Raises:
    errors.UsageError: A set's images are not of the size that the network takes.
    errors.DataError: The alignments differ, and `is_strict`.
  """
  image_size = int(marker["image_size"])
  for each in sets:
    if each.image_size != image_size:
      raise errors.UsageError(
        f"--verification_data: the images of {each.name} are {each.image_size} pixels "
        f"wide, but the network takes {image_size}; build the set with "
        f"--image_size={image_size}."
      )
    check_alignment(
      marker,
      each.alignment,
      data=f"--verification_data: {each.name}",
      is_strict=is_strict,
    )


def network_facts(
  network: InferenceNetwork,
  checkpoint: checkpoints.Checkpoint,
  *,
  normalize: bool,
  mirror: bool,
) -> dict[str, Any]:
  """Returns the facts that embeddings must share to be comparable.

  Args:
    network: With the checkpoint's weights.
    checkpoint: Whose weights they are.
    normalize: Whether embeddings have length 1.
    mirror: Whether an embedding is of image plus mirrored image.
  """
  return {
    "model": network.name.split("@")[0],
    "checkpoint": checkpoint.name,
    "step": checkpoint.step,
    "weights": network.weights,
    "weights_crc32c": weights_crc32c(checkpoint, network.weights),
    "embedding_size": network.embedding_size,
    "image_size": network.image_size,
    "normalized": normalize,
    "mirrored": mirror,
  }


def weights_crc32c(checkpoint: checkpoints.Checkpoint, weights: str) -> str:
  """Returns eight hex digits that identify the weights, across runs too.

  Args:
    checkpoint: Contains the weights.
    weights: Which of its weights: trained or ema.
  """
  files = checkpoint.marker()["files"]
  checksums = [files[name]["crc32c"] for name in sorted(files)]
  checksums += [] if weights == "trained" else [weights]
  return f"{storage.crc32c_of(json.dumps(checksums).encode()):08x}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingSettings:
  """Which network to use, and what to do with its raw embeddings."""

  workdir: str = setting(help="Folder of the training run.", path=True)
  checkpoint: str | None = setting(None, help=CHECKPOINT_HELP, path=True)
  weights: str = setting("auto", help=WEIGHTS_HELP, choices=WEIGHTS)
  normalize: bool = setting(True, help="Whether embeddings have length 1.")
  mirror: bool = setting(
    False, help="Whether to embed image plus mirrored image, as evaluation does."
  )
