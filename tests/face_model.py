"""A network with YuNet's inputs and outputs that finds coloured cells, for tests.

A red cell of 32 x 32 pixels is a face of 128 x 128 pixels about it, a blue cell of 8 x
8 pixels one of 32 x 32. The landmarks lie in the box as in ArcFace's template.
OpenCV's own FaceDetectorYN runs it.
"""

import math

import cv2
import numpy as np
import onnx
from onnx import helper, numpy_helper

from facedist.data import alignment

RED, BLUE = (0, 0, 255), (255, 0, 0)  # BGR
LARGE, SMALL = 32, 8  # pixels of a cell: the stride of the output that sees it
SIDES = 4  # of a box, in cells
_CHANNELS = {8: 0, 16: None, 32: 2}


def model() -> bytes:
  """Returns the ONNX file."""
  nodes, weights, outputs = [], [], []

  def node(kind: str, inputs: list[str], output: str, **attributes: list[int]) -> None:
    nodes.append(helper.make_node(kind, inputs, [output], **attributes))

  points = alignment.TEMPLATE / alignment.TEMPLATE_SIZE * SIDES - SIDES / 2 + 0.5
  bias_of = {
    "cls": np.zeros(1),
    "obj": np.zeros(1),
    "bbox": np.array([0.5, 0.5, math.log(SIDES), math.log(SIDES)]),
    "kps": points.ravel(),
  }
  for stride in _CHANNELS:
    sides = [stride, stride]
    node("AveragePool", ["input"], f"mean_{stride}", kernel_shape=sides, strides=sides)
  for kind, bias in bias_of.items():
    for stride, channel in _CHANNELS.items():
      weight = np.zeros((len(bias), 3, 1, 1), np.float32)
      if kind in ("cls", "obj") and channel is not None:
        weight[:, channel] = 1 / 255
      name = f"{kind}_{stride}"
      shape = np.array([1, -1, len(bias)])
      parts = {"weight": weight, "bias": bias.astype(np.float32), "shape": shape}
      for part, values in parts.items():
        weights.append(numpy_helper.from_array(values, f"{name}_{part}"))
      given = [f"mean_{stride}", f"{name}_weight", f"{name}_bias"]
      node("Conv", given, f"{name}_map", kernel_shape=[1, 1])
      node("Transpose", [f"{name}_map"], f"{name}_last", perm=[0, 2, 3, 1])
      node("Reshape", [f"{name}_last", f"{name}_shape"], name)
      outputs.append(
        helper.make_tensor_value_info(
          name, onnx.TensorProto.FLOAT, [1, None, len(bias)]
        )
      )
  image = helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 3, 64, 64])
  graph = helper.make_graph(nodes, "cells", [image], outputs, weights)
  opsets = [helper.make_opsetid("", 11)]
  made = helper.make_model(graph, opset_imports=opsets, ir_version=8)
  onnx.checker.check_model(made)
  return made.SerializeToString()


def paint(
  image: np.ndarray, row: int, column: int, *, cell: int = LARGE, scale: int = 1
) -> None:
  """Paints a face's cell into an image that is `scale` times the network's size."""
  side = cell * scale
  color = RED if cell == LARGE else BLUE
  top, left = row * side, column * side
  cv2.rectangle(
    image, (left, top), (left + side - 1, top + side - 1), color, thickness=-1
  )


def landmarks_of(row: int, column: int, *, cell: int = LARGE) -> np.ndarray:
  """Returns where the network says that the points are: float64[5, 2]."""
  middle = (np.array([column, row]) + 0.5) * cell
  fractions = alignment.TEMPLATE / alignment.TEMPLATE_SIZE
  return middle + (fractions - 0.5) * SIDES * cell
