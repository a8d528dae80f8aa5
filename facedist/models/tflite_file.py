"""A network as a TFLite file, and such a file as a function of pixels.

The file takes one image, RGB pixels in [0, 255]: float32[1, S, S, 3], or with int8
uint8[1, S, S, 3]. It returns one embedding, float32[1, embedding], or with int8
int8[1, embedding], which stands for (value - zero_point) * scale with the two numbers
that the file has for its output.

  float32   weights and activations are float32
  float16   weights are stored in half the bytes, and computed with in float32
  int8      weights and activations are integers of 8 bits, throughout. The ranges of
            activations are those of the calibration images.

An int8 embedding is not scaled to length 1 and has no mirror image added: rounded to 8
bits before the division, most of its floats would have a handful of values. Divide by
its length, as the cosine does.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf

from facedist.models import serving
from facedist.models.backbones import layers

PRECISIONS = ("float32", "float16", "int8")


def write(
  served: serving.ServedNetwork,
  path: str,
  *,
  precision: str,
  calibration: Iterable[np.ndarray] = (),
) -> None:
  """Converts the network to TFLite.

  Args:
    served: Its network must compute in float32 and not be compiled before. For int8 it
      must neither mirror nor normalise.
    path: The local file to write.
    precision: One of `PRECISIONS`.
    calibration: uint8[S, S, 3] RGB images whose activations decide the ranges of int8.
  """
  side = served.image_size
  takes = tf.TensorSpec([1, side, side, 3], tf.float32, name="images")
  with layers.keras_prelu():
    function = tf.function(
      served.embed, input_signature=[takes], autograph=False
    ).get_concrete_function()
  model = tf.Module()
  model.held = list(served.variables)
  converter = tf.lite.TFLiteConverter.from_concrete_functions([function], model)
  if precision != "float32":
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
  if precision == "float16":
    converter.target_spec.supported_types = [tf.float16]
  if precision == "int8":
    images = [image[np.newaxis].astype(np.float32) for image in calibration]
    converter.representative_dataset = lambda: ([image] for image in images)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = tf.uint8
    converter.inference_output_type = tf.int8
  with _quiet():
    content = converter.convert()
  with open(path, "wb") as stream:
    stream.write(content)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Discards what the converter's C++ code prints about each kind of operation.

  No log level turns that off. An error is an exception with its message.
  """
  sys.stderr.flush()
  before = os.dup(2)
  try:
    with open(os.devnull, "wb") as nowhere:
      os.dup2(nowhere.fileno(), 2)
    yield
  finally:
    os.dup2(before, 2)
    os.close(before)


def load(path: str) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function that runs a file of `write`, an image at a time.

  It takes uint8[batch, S, S, 3] RGB images and returns float32[batch, embedding].
  """
  with warnings.catch_warnings():
    # TensorFlow 2.21 says so of every use; its successor is not in its own package.
    warnings.filterwarnings(
      "ignore", r"\s*Warning: tf\.lite\.Interpreter is deprecated"
    )
    interpreter = tf.lite.Interpreter(path, num_threads=1)
  interpreter.allocate_tensors()
  (takes,), (returns,) = (
    interpreter.get_input_details(),
    interpreter.get_output_details(),
  )
  scale, zero_point = returns["quantization"]

  def embed_one(image: np.ndarray) -> np.ndarray:
    interpreter.set_tensor(takes["index"], image[np.newaxis].astype(takes["dtype"]))
    interpreter.invoke()
    return interpreter.get_tensor(returns["index"])[0]

  def embed(images: np.ndarray) -> np.ndarray:
    found = np.stack([embed_one(image) for image in images])
    if found.dtype == np.int8:
      return (found.astype(np.float32) - zero_point) * np.float32(scale)
    return found

  return embed
