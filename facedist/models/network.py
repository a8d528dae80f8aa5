"""The whole network: pixels to an embedding."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf

from facedist.config import lookup
from facedist.models import backbones, outputs


class FaceNetwork(tf.Module):
  """A backbone and the embedding layer over it."""

  def __init__(
    self, *, backbone: tf.keras.Model, embedding: tf.keras.Model, image_size: int
  ) -> None:
    super().__init__(name="network")
    self.backbone = backbone
    self.embedding = embedding
    self.image_size = image_size

  def embed(
    self,
    images: tf.Tensor,
    *,
    training: bool = False,
    training_backbone: bool | None = None,
    draws: tf.Tensor | None = None,
  ) -> tf.Tensor:
    """Returns raw embeddings, not normalised.

    Args:
      images: uint8 or float32[batch, S, S, 3], RGB in [0, 255].
      training: Whether dropout and batch statistics are in use.
      training_backbone: The same for the backbone alone; `training` if none.
      draws: float32[batch], which say what is dropped of each sample in training; not
        needed without dropout.

    Returns:
      float32[batch, embedding].
    """
    in_backbone = training if training_backbone is None else training_backbone
    features = self.backbone(tf.cast(images, tf.float32), training=in_backbone)
    if len(self.embedding.inputs) == 1:
      return self.embedding(features, training=training)
    if training and draws is None:
      raise ValueError("dropout in training needs a draw for each sample")
    keys = tf.zeros(tf.shape(images)[:1]) if draws is None else draws
    return self.embedding([features, tf.bitcast(keys, tf.int32)], training=training)


@tf.autograph.experimental.do_not_convert
def build_network(
  *,
  backbone: str,
  image_size: int,
  embedding_size: int,
  policy: str,
  pooling: str = "auto",
  embedding_batch_norm: bool = True,
  dropout: float | None = None,
  batch_norm_momentum: float = 0.99,
  sync_batch_norm: bool = False,
  freeze_until: str | None = None,
) -> FaceNetwork:
  """Builds a network with random weights under the precision policy.

  Args:
    backbone: A key of `backbones.BACKBONES`.
    image_size: Height and width in pixels.
    embedding_size: Floats of an embedding.
    policy: Keras' name of the precision, such as mixed_bfloat16.
    pooling: A key of `outputs.OUTPUTS`, or auto for the backbone's own.
    embedding_batch_norm: Whether batch norm follows the embedding layer.
    dropout: Share of features dropped before the embedding layer; none for the
      backbone's own.
    batch_norm_momentum: Of the moving averages, for all layers.
    sync_batch_norm: Whether batch statistics are those of the global batch.
    freeze_until: The last of the backbone's layers that do not train; none for none.

  Raises:
    errors.UsageError: There is no such backbone, pooling or layer, or the backbone
      takes no images of that size.
  """
  usual = lookup(backbones.BACKBONES, backbone, "backbone")
  with _policy(policy):
    trunk = backbones.build(backbone, image_size)
    embedding = outputs.build(
      trunk.output_shape[1:],
      embedding_size=embedding_size,
      pooling=usual.pooling if pooling == "auto" else pooling,
      batch_norm=embedding_batch_norm,
      dropout=usual.dropout if dropout is None else dropout,
    )
  for layer in (*trunk.layers, *embedding.layers):
    if isinstance(layer, tf.keras.layers.BatchNormalization):
      layer.momentum = batch_norm_momentum
      if sync_batch_norm:
        # Keras applications make their own layers; in these two attributes they differ
        # from SynchronizedBatchNormalization, which has no fused kernel
        layer.synchronized, layer.fused = True, False
  if freeze_until:
    backbones.freeze(trunk, freeze_until)
  return FaceNetwork(backbone=trunk, embedding=embedding, image_size=image_size)


def is_decayed(variable: tf.Variable) -> bool:
  """Says whether weight decay applies: kernels and class centres, nothing else."""
  name = variable.name.split(":")[0].rsplit("/", 1)[-1]
  return name.endswith("kernel") or name == "centres"


@contextlib.contextmanager
def _policy(name: str) -> Iterator[None]:
  """Sets Keras' global policy for the layers made in the body, then puts it back."""
  before = tf.keras.mixed_precision.global_policy()
  tf.keras.mixed_precision.set_global_policy(name)
  try:
    yield
  finally:
    tf.keras.mixed_precision.set_global_policy(before)
