"""A network as a SavedModel: from pixels, or from encoded images, to embeddings."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf
from absl import logging

PIXELS_SIGNATURE = "serving_default"
ENCODED_SIGNATURE = "serving_encoded"
MODEL_FILE = "saved_model.pb"
"""The file that every SavedModel folder has."""
_SEARCHED_BYTES = 1 << 18  # EXIF data are near the start of a file
_ENTRY_BYTES = 12
_ORIENTATION_TAG, _SHORT = 0x0112, 3


@dataclasses.dataclass(frozen=True)
class ServedNetwork:
  """The computation of a SavedModel, the same as `Embedder`'s with these settings.

  Attributes:
    network: Takes uint8[batch, S, S, 3] RGB pixels and returns raw
      float32[batch, embedding].
    variables: All variables that `network` reads.
    image_size: S, height and width in pixels.
    mirror: Whether to add the mirror image's raw embedding.
    normalize: Whether embeddings are scaled to L2 norm 1; zero stays zero.
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
      norms = tf.norm(embeddings, axis=1, keepdims=True)
      embeddings = tf.math.divide_no_nan(embeddings, norms)
    return {"embeddings": embeddings}

  def embed_encoded(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
    """Embeds encoded images; it does not detect faces.

    Args:
      image_bytes: string[batch], each a JPEG or PNG file of S × S pixels. It is turned
        upright by its EXIF orientation, as `data.decoding` does.

    Returns:
      `embeddings`, float32[batch, embedding].

    Raises:
      tf.errors.InvalidArgumentError: A string is not such a file, or of another size.
    """
    shape = (self.image_size, self.image_size, 3)
    pixels = tf.TensorSpec(shape, tf.uint8)
    return self.embed(tf.map_fn(self._decode, image_bytes, fn_output_signature=pixels))

  def save(self, folder: str) -> None:
    """Writes the SavedModel; loading it does not need this package.

    Args:
      folder: A local folder.
    """
    # Variables only: with Keras' layers, TensorFlow would also write Keras' own files.
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
    """Returns the uint8[S, S, 3] of a JPEG or PNG file, upright.

    TensorFlow's default JPEG decoding is fast, but a few levels off libjpeg-turbo's,
    which decodes for training. INTEGER_ACCURATE gives the same pixels. PNG works too.
    """
    pixels = tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE")
    shape, side = tf.shape(pixels), self.image_size
    rule = (
      f"image_bytes must be images of {side} x {side} pixels, aligned as for training; "
      "crop or resize them before they are sent. One has height, width, channels"
    )
    is_right = tf.reduce_all(shape == [side, side, 3])
    with tf.control_dependencies([tf.debugging.Assert(is_right, [rule, shape])]):
      pixels = tf.reshape(pixels, [side, side, 3])
    orientation = _orientation(tf.io.decode_raw(content, tf.uint8))
    pixels = tf.where(orientation >= 5, tf.transpose(pixels, [1, 0, 2]), pixels)
    is_flipped = tf.reduce_any(orientation == (2, 3, 6, 7))
    pixels = tf.where(is_flipped, pixels[:, ::-1], pixels)
    is_upside_down = tf.reduce_any(orientation == (3, 4, 7, 8))
    return tf.where(is_upside_down, pixels[::-1], pixels)


def _orientation(content: tf.Tensor) -> tf.Tensor:
  """Returns the EXIF orientation of a JPEG or PNG file, int32[], as `data.decoding`.

  EXIF data are a TIFF file: two letters for the byte order, a number, and the offset of
  a directory. That has a count, then entries of 12 bytes: tag, type, count and value.

  Args:
    content: uint8[bytes], the file.
  """
  before, after = len(b"Exif\0\0"), _ENTRY_BYTES + 2
  padded = tf.pad(content[:_SEARCHED_BYTES], [[before, after]])
  file = tf.cast(padded, tf.int32)
  big, little = file[:-1] * 256 + file[1:], file[:-1] + file[1:] * 256
  is_little = _occurs(big, b"II*\0")
  is_start = (is_little | _occurs(big, b"MM\0*"))[before:] & (
    _occurs(big, b"Exif")[:-before] | _occurs(big, b"eXIf")[2 : 2 - before]
  )
  starts = tf.where(is_start)[:, 0] + before
  start = tf.concat([starts, [tf.size(file, tf.int64) - after]], 0)[0]
  shorts = tf.where(is_little[start], little, big)[start:]
  high = tf.where(is_little[start], shorts[6], shorts[4])
  low = tf.where(is_little[start], shorts[4], shorts[6])
  last = tf.size(shorts) - _ENTRY_BYTES
  directory = tf.where(high == 0, tf.minimum(low, last), last)
  end = tf.minimum(directory + 2 + _ENTRY_BYTES * shorts[directory], last + 1)
  entries = tf.range(directory + 2, tf.maximum(end, directory + 2), _ENTRY_BYTES)
  is_tag = tf.gather(shorts, entries) == _ORIENTATION_TAG
  is_tag &= tf.gather(shorts, entries + 2) == _SHORT
  values = tf.gather(shorts, tf.boolean_mask(entries, is_tag) + 8)
  value = tf.concat([values, [1]], 0)[0]
  return tf.where((value >= 1) & (value <= 8), value, 1)


def _occurs(pairs: tf.Tensor, letters: bytes) -> tf.Tensor:
  """Returns bool[n - 2]: where four letters occur in int32[n] pairs of bytes."""
  first, second = (int.from_bytes(part, "big") for part in (letters[:2], letters[2:]))
  return (pairs[:-2] == first) & (pairs[2:] == second)


def _compiled(
  function: Callable[[tf.Tensor], dict[str, tf.Tensor]], takes: tf.TensorSpec
) -> tf.types.experimental.ConcreteFunction:
  """Returns the function as a graph for any batch size."""
  return tf.function(
    function, input_signature=[takes], autograph=False
  ).get_concrete_function()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences TensorFlow's log lines about the inner names of a SavedModel."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.WARNING)
  try:
    yield
  finally:
    logging.set_verbosity(before)
