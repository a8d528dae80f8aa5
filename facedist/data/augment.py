"""Random augmentation of training images, computed on the accelerator.

The random numbers are a pure function of seed, record and epoch, so a sample is the
same in any batch, on any replica and for any number of workers.
"""

import numpy as np
import tensorflow as tf

from facedist import addons
from facedist.data import hashing

NUM_DRAWS = 10
"""Draws of a sample: flip, crop side, crop y, crop x, brightness, contrast, saturation,
dropout, cutout y, cutout x."""
DROPOUT = 7
"""The draw for the network's dropout; the others are for the image."""
_GREY = 127.5  # the middle of the range
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as JPEG's


def draws(seed: int, records: np.ndarray, epochs: np.ndarray) -> np.ndarray:
  """Draws the numbers that decide how samples are changed.

  Args:
    seed: Any integer.
    records: int64[batch].
    epochs: int64[batch].

  Returns:
    float32[batch, NUM_DRAWS], uniform in [0, 1).
  """
  bits = hashing.combine(seed, records[:, None], epochs[:, None], np.arange(NUM_DRAWS))
  # The upper 24 bits fill float32's mantissa; more could round up to 1.
  return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def augment(
  images: tf.Tensor,
  draws: tf.Tensor,
  *,
  flip: bool,
  crop: float,
  color: float,
  cutout: float = 0.0,
) -> tf.Tensor:
  """Mirrors, crops, recolours and partly covers each image according to its draws.

  Args:
    images: uint8[batch, size, size, 3] RGB.
    draws: float32[batch, NUM_DRAWS], from the function of that name.
    flip: Whether to mirror half of the images left to right.
    crop: Largest fraction of the side that a square crop leaves out, in [0, 1); the
      crop is resized to full size by bilinear interpolation.
    color: Brightness, contrast and saturation are each multiplied by a factor from
      [1 - color, 1 + color), in [0, 1].
    cutout: Side of a grey square as a fraction of the image's side, in [0, 1]. Its
      centre is any pixel, so it may lie partly outside (arXiv:1708.04552).

  Returns:
    float32[batch, size, size, 3] in [0, 255].
  """
  pixels = tf.cast(images, tf.float32)
  if flip or crop:
    pixels = _crop(pixels, draws, flip=flip, crop=crop)
  if color:
    pixels = _recolor(pixels, draws, color)
  return _cut_out(pixels, draws, cutout) if cutout else pixels


def _crop(pixels: tf.Tensor, draws: tf.Tensor, *, flip: bool, crop: float) -> tf.Tensor:
  """Crops, mirrors and resizes in one pass; a box from right to left mirrors."""
  side = 1.0 - crop * draws[:, 1]
  top, left = (1.0 - side) * draws[:, 2], (1.0 - side) * draws[:, 3]
  bottom, right = top + side, left + side
  if flip:
    is_mirrored = draws[:, 0] < 0.5
    left, right = (
      tf.where(is_mirrored, right, left),
      tf.where(is_mirrored, left, right),
    )
  boxes = tf.stack([top, left, bottom, right], axis=1)
  # Rounding may put an edge slightly outside, where the op would fill in black.
  boxes = tf.clip_by_value(boxes, 0.0, 1.0)
  samples = tf.range(tf.shape(pixels)[0])
  return tf.image.crop_and_resize(pixels, boxes, samples, pixels.shape[1:3])


def _recolor(pixels: tf.Tensor, draws: tf.Tensor, color: float) -> tf.Tensor:
  """Changes brightness, then contrast, then saturation; all three are linear.

  With factors b, c, s, a pixel x of grey value g in an image of mean grey value m
  becomes b·(c·(s·x + (1 - s)·g) + (1 - c)·m); multiplied out it takes fewer passes.
  """
  factors = 1.0 + color * (2.0 * draws[:, 4:7, None, None, None] - 1.0)
  brightness, contrast, saturation = tf.unstack(factors, axis=1)
  grey = tf.reduce_sum(pixels * _LUMA, axis=3, keepdims=True)
  mean = tf.reduce_mean(grey, axis=[1, 2], keepdims=True)
  gain = brightness * contrast
  offset = gain * (1.0 - saturation) * grey + brightness * (1.0 - contrast) * mean
  return tf.clip_by_value(gain * saturation * pixels + offset, 0.0, 255.0)


def _cut_out(pixels: tf.Tensor, draws: tf.Tensor, fraction: float) -> tf.Tensor:
  """Covers a square; its side is rounded to an even number of pixels."""
  size = pixels.shape[1]
  centres = tf.cast(draws[:, 8:10] * size, tf.int32)
  side = 2 * round(fraction * size / 2)
  return addons.cutout(pixels, side, centres, _GREY)
