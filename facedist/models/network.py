"""The whole network: pixels to an embedding."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf

from facedist.models import backbones


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
  ) -> tf.Tensor:
    """Returns raw embeddings, not normalised.

    Args:
      images: uint8 or float32[batch, S, S, 3], RGB in [0, 255].
      training: Whether dropout and batch statistics are in use.
      training_backbone: The same for the backbone alone; `training` if none.

    Returns:
      float32[batch, embedding].
    """
    in_backbone = training if training_backbone is None else training_backbone
    features = self.backbone(tf.cast(images, tf.float32), training=in_backbone)
    return self.embedding(features, training=training)


def build_network(
  *,
  backbone: str,
  image_size: int,
  embedding_size: int,
  pooling: str,
  embedding_batch_norm: bool,
  dropout: float,
  batch_norm_momentum: float,
  policy: str,
) -> FaceNetwork:
  """Builds a network with random weights under the precision policy.

  Raises:
    errors.UsageError: There is no such backbone or the images are too small for it.
  """
  with _policy(policy):
    trunk = backbones.build(backbone, image_size)
    embedding = _embedding_layer(
      trunk.output_shape[1:],
      embedding_size=embedding_size,
      pooling=pooling,
      batch_norm=embedding_batch_norm,
      dropout=dropout,
    )
  for layer in (*trunk.layers, *embedding.layers):
    if isinstance(layer, tf.keras.layers.BatchNormalization):
      layer.momentum = batch_norm_momentum
  return FaceNetwork(backbone=trunk, embedding=embedding, image_size=image_size)


def is_decayed(variable: tf.Variable) -> bool:
  """Says whether weight decay applies: kernels and class centres, nothing else."""
  name = variable.name.split(":")[0].rsplit("/", 1)[-1]
  return name.endswith("kernel") or name == "centres"


def _embedding_layer(
  feature_shape: tuple[int, ...],
  *,
  embedding_size: int,
  pooling: str,
  batch_norm: bool,
  dropout: float,
) -> tf.keras.Model:
  """Pooling, dropout, a linear layer, and batch norm in float32."""
  features = tf.keras.Input(feature_shape, name="features")
  if pooling == "flatten":
    vector = tf.keras.layers.Flatten()(features)
  else:
    vector = tf.keras.layers.GlobalAveragePooling2D()(features)
  if dropout:
    vector = tf.keras.layers.Dropout(dropout)(vector)
  vector = tf.keras.layers.Dense(embedding_size, use_bias=False)(vector)
  vector = tf.keras.layers.Activation("linear", dtype="float32")(vector)
  if batch_norm:
    vector = tf.keras.layers.BatchNormalization(dtype="float32")(vector)
  return tf.keras.Model(features, vector, name="embedding")


@contextlib.contextmanager
def _policy(name: str) -> Iterator[None]:
  """Sets Keras' global policy for the layers made in the body, then puts it back."""
  before = tf.keras.mixed_precision.global_policy()
  tf.keras.mixed_precision.set_global_policy(name)
  try:
    yield
  finally:
    tf.keras.mixed_precision.set_global_policy(before)
