"""A network as a SavedModel: from pixels, or from encoded images, to embeddings."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf
from absl import logging

PIXELS_SIGNATURE = "serving_default"
ENCODED_SIGNATURE = "serving_encoded"
MODEL_FILE = "saved_model.pb"
"""What makes a folder a SavedModel."""


@dataclasses.dataclass(frozen=True)
class ServedNetwork:
  """What a SavedModel computes; with these settings as `Embedder` does.

  Attributes:
    network: Takes uint8[batch, S, S, 3] RGB pixels and returns raw
      float32[batch, embedding].
    variables: All those that `network` reads.
    image_size: S, height and width in pixels.
    mirror: Whether to add the mirror image's raw embedding.
    normalize: Whether embeddings leave with length 1 (L2); zero stays zero.
  """

  network: Callable[[tf.Tensor], tf.Tensor]
  variables: Sequence[tf.Variable]
  image_size: int
  mirror: bool
  normalize: bool

  def embed(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
    """Embeds pixels.

    Args:
      images: uint8[batch, S, S, 3], RGB.

    Returns:
      `embeddings`, float32[batch, embedding].
    """
    embeddings = tf.cast(self.network(images), tf.float32)
    if self.mirror:
      embeddings += tf.cast(self.network(images[:, :, ::-1]), tf.float32)
    if self.normalize:
      lengths = tf.norm(embeddings, axis=1, keepdims=True)
      embeddings = tf.math.divide_no_nan(embeddings, lengths)
    return {"embeddings": embeddings}

  def embed_encoded(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
    """Embeds images as files hold them; no face is looked for.

    Args:
      image_bytes: string[batch], each a JPEG or PNG file of S × S pixels.

    Returns:
      `embeddings`, float32[batch, embedding].

    Raises:
      tf.errors.InvalidArgumentError: A string is no such file, or of another size.
    """
    shape = (self.image_size, self.image_size, 3)
    pixels = tf.TensorSpec(shape, tf.uint8)
    return self.embed(tf.map_fn(self._decode, image_bytes, fn_output_signature=pixels))

  def save(self, folder: str) -> None:
    """Writes the SavedModel; it needs no code of ours to be loaded.

    Args:
      folder: A local one.
    """
    # The variables alone: Keras' layers would bring Keras' own files along.
    model = tf.Module()
    model.held = list(self.variables)
    side = self.image_size
    pixels = tf.TensorSpec([None, side, side, 3], tf.uint8, name="images")
    encoded = tf.TensorSpec([None], tf.string, name="image_bytes")
    signatures = {
      PIXELS_SIGNATURE: _compiled(self.embed, pixels),
      ENCODED_SIGNATURE: _compiled(self.embed_encoded, encoded),
    }
    with _quiet():
      tf.saved_model.save(model, folder, signatures=signatures)

  def _decode(self, content: tf.Tensor) -> tf.Tensor:
    """Returns the uint8[S, S, 3] of a JPEG or PNG file.

    TensorFlow's default decoding is fast and a few levels off most pixels that
    libjpeg-turbo decodes for training; this one gives the same. It takes PNG too.
    """
    pixels = tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE")
    shape, side = tf.shape(pixels), self.image_size
    rule = (
      f"image_bytes must be images of {side} x {side} pixels, aligned as for training; "
      "crop or resize them before they are sent. One has height, width, channels"
    )
    is_right = tf.reduce_all(shape == [side, side, 3])
    with tf.control_dependencies([tf.debugging.Assert(is_right, [rule, shape])]):
      return tf.reshape(pixels, [side, side, 3])


def _compiled(
  function: Callable[[tf.Tensor], dict[str, tf.Tensor]], takes: tf.TensorSpec
) -> tf.types.experimental.ConcreteFunction:
  """Returns the function as a graph for any batch."""
  return tf.function(
    function, input_signature=[takes], autograph=False
  ).get_concrete_function()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps out of the log what TensorFlow notes of a SavedModel's inner names."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.WARNING)
  try:
    yield
  finally:
    logging.set_verbosity(before)
