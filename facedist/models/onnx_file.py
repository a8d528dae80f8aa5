"""A network as an ONNX file, and such a file as a function of pixels.

The file takes `images`, float32[batch, 3, S, S] (or with nhwc [batch, S, S, 3]): RGB
pixels as (x - 127.5) / 127.5, in [-1, 1]. It returns one output, `embeddings`,
float32[batch, embedding]. The batch may have any size. It is of opset `OPSET`.

InsightFace (python-package/insightface/model_zoo) takes an ONNX file with one output
and square input [batch, 3, 112, 112] for its ArcFaceONNX. That class scales pixels
itself, unless among the first eight nodes of the graph one has a name that begins with
Sub or _minus and one a name that begins with Mul or _mul: then it feeds [0, 255]. No
node here has such a name, although the graph begins with x * 127.5 + 127.5, so that
backbones with another scaling fit too; so InsightFace takes 127.5 for input_mean and
input_std, which is right.
"""

import json
import logging as python_logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from facedist import errors
from facedist.models import serving
from facedist.models.backbones import layers

OPSET = 13
LAYOUTS = ("nchw", "nhwc")
INPUT, OUTPUT = "images", "embeddings"
METADATA = "facedist"
"""The key of the file's metadata that has the facts, as JSON."""
_NODE_PREFIX = "facedist/"


def check_installed() -> None:
  """Raises UsageError where a library that ONNX files need is not installed."""
  try:
    versions()
  except ImportError as error:
    raise errors.UsageError(
      f"an ONNX file needs onnx, tf2onnx and onnxruntime ({error}); pip install "
      "'facedist[onnx]'."
    ) from error


def versions() -> dict[str, str]:
  """Returns the versions of the libraries that write and try an ONNX file."""
  import onnx
  import onnxruntime
  import tf2onnx

  libraries = (onnx, tf2onnx, onnxruntime)
  return {each.__name__: each.__version__ for each in libraries}


def write(
  served: serving.ServedNetwork, path: str, *, layout: str, facts: Mapping[str, Any]
) -> None:
  """Converts the network to ONNX.

  Args:
    served: Its network must compute in float32 and not be compiled before.
    path: The local file to write.
    layout: One of `LAYOUTS`.
    facts: Written as JSON into the file's metadata.
  """
  import onnx
  import tf2onnx

  python_logging.getLogger("tf2onnx").setLevel(python_logging.WARNING)
  side = served.image_size
  shape = [None, 3, side, side] if layout == "nchw" else [None, side, side, 3]

  def embed(scaled: tf.Tensor) -> dict[str, tf.Tensor]:
    pixels = scaled * 127.5 + 127.5
    return served.embed(
      tf.transpose(pixels, [0, 2, 3, 1]) if layout == "nchw" else pixels
    )

  signature = [tf.TensorSpec(shape, tf.float32, name=INPUT)]
  with layers.keras_prelu():
    model, _ = tf2onnx.convert.from_function(
      tf.function(embed, input_signature=signature, autograph=False),
      input_signature=signature,
      opset=OPSET,
    )
  model.producer_name, model.doc_string = "facedist", ""
  for node in model.graph.node:
    node.name = _NODE_PREFIX + node.name
  for value in (*model.graph.input, *model.graph.output):
    value.type.tensor_type.shape.dim[0].dim_param = "batch"
  onnx.helper.set_model_props(model, {METADATA: json.dumps(dict(facts))})
  onnx.checker.check_model(model)
  onnx.save(model, path)


def read_facts(path: str) -> dict[str, Any]:
  """Returns the facts in a file of `write`."""
  import onnx

  entries = onnx.load(path, load_external_data=False).metadata_props
  return json.loads({each.key: each.value for each in entries}[METADATA])


def load(path: str, *, layout: str) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function that runs a file of `write` on the CPU.

  It takes uint8[batch, S, S, 3] RGB images and returns float32[batch, embedding].
  """
  import onnxruntime

  session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

  def embed(images: np.ndarray) -> np.ndarray:
    scaled = (images.astype(np.float32) - 127.5) / 127.5
    if layout == "nchw":
      scaled = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
    return session.run([OUTPUT], {INPUT: scaled})[0]

  return embed
