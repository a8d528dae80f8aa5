"""Networks as ONNX and TFLite files: what they embed, and what readers of them see."""

import pathlib
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf

from facedist import errors
from facedist.models import onnx_file, serving, tflite_file
from facedist.models.network import build_network
from facedist.training import ema


def _served(
  backbone: str, image_size: int, *, mirror: bool = False, normalize: bool = True
) -> serving.ServedNetwork:
  """A network whose weights are all random, so that none of its parts is the identity.

  PReLU's slopes have both signs.
  """
  network = build_network(
    backbone=backbone, image_size=image_size, embedding_size=24, policy="float32"
  )
  rng = np.random.default_rng(0)
  for variable in ema.weights(network):
    name = variable.name.split(":")[0].rsplit("/", 1)[-1]
    if name in ("gamma", "moving_variance"):
      variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    elif name in ("beta", "moving_mean", "bias"):
      variable.assign(rng.normal(0.0, 0.2, variable.shape))
    elif name == "alpha":
      variable.assign(rng.uniform(-0.2, 0.5, variable.shape))
  return serving.ServedNetwork(
    network.embed,
    ema.weights(network),
    image_size=image_size,
    mirror=mirror,
    normalize=normalize,
  )


def _images(image_size: int, count: int) -> np.ndarray:
  shape = (count, image_size, image_size, 3)
  return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("backbone", "image_size", "layout", "mirror"),
  [
    ("resnet50", 32, "nchw", False),
    ("iresnet18", 16, "nchw", True),
    ("mobilefacenet", 16, "nhwc", True),
  ],
)
def test_an_onnx_file_embeds_as_the_network_and_insightface_scales_its_pixels(
  tmp_path: pathlib.Path, backbone: str, image_size: int, layout: str, mirror: bool
):
  served = _served(backbone, image_size, mirror=mirror)
  images = _images(image_size, 3)
  expected = served.embed(tf.constant(images))["embeddings"]
  path = str(tmp_path / "model.onnx")
  onnx_file.write(served, path, layout=layout, facts={})
  embed = onnx_file.load(path, layout=layout)
  np.testing.assert_allclose(embed(images), expected, atol=1e-4)
  np.testing.assert_allclose(embed(images[:1]), expected[:1], atol=1e-4)
  nodes = onnx.load(path).graph.node
  # otherwise a PReLU becomes a comparison and a choice, each between two transposes
  assert not {node.op_type for node in nodes} & {"Greater", "Cast"}
  # as ArcFaceONNX looks at names; resnet50 subtracts means at its start
  if backbone == "resnet50":
    assert {"Sub", "Mul"} <= {node.op_type for node in nodes[:8]}
  finds_sub = any(node.name.startswith(("Sub", "_minus")) for node in nodes[:8])
  finds_mul = any(node.name.startswith(("Mul", "_mul")) for node in nodes[:8])
  assert not (finds_sub and finds_mul)


def test_a_file_says_its_opset_facts_inputs_and_outputs(tmp_path: pathlib.Path):
  path = str(tmp_path / "model.onnx")
  onnx_file.write(_served("vgg8", 8), path, layout="nchw", facts={"step": 7})
  model = onnx.load(path)
  assert {each.domain: each.version for each in model.opset_import}[""] == 13
  assert {each.key: each.value for each in model.metadata_props} == {
    "facedist": '{"step": 7}'
  }
  session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
  (takes,), (returns,) = session.get_inputs(), session.get_outputs()
  assert (takes.name, takes.shape) == ("images", ["batch", 3, 8, 8])
  assert takes.type == "tensor(float)"
  assert (returns.name, returns.shape) == ("embeddings", ["batch", 24])


def test_an_image_that_embeds_as_zero_stays_zero(tmp_path: pathlib.Path):
  served = serving.ServedNetwork(
    lambda images: images[:, 0, :2, 0], [], image_size=8, mirror=False, normalize=True
  )
  path = str(tmp_path / "model.onnx")
  onnx_file.write(served, path, layout="nchw", facts={})
  images = np.zeros((2, 8, 8, 3), np.uint8)
  images[1, 0, :2, 0] = 30, 40
  found = onnx_file.load(path, layout="nchw")(images)
  np.testing.assert_allclose(found, [[0, 0], [0.6, 0.8]], atol=1e-6)


@pytest.mark.slow
def test_tflite_files_embed_as_the_network_in_each_precision(tmp_path: pathlib.Path):
  images = _images(16, 40)
  found, sizes = {}, {}
  for precision in tflite_file.PRECISIONS:
    is_int8 = precision == "int8"
    served = _served("mobilefacenet", 16, mirror=not is_int8, normalize=not is_int8)
    path = tmp_path / f"{precision}.tflite"
    calibration = images if is_int8 else ()
    tflite_file.write(served, str(path), precision=precision, calibration=calibration)
    sizes[precision] = path.stat().st_size
    raw = tflite_file.load(str(path))(images)
    expected = served.embed(tf.constant(images))["embeddings"].numpy()
    if precision == "float32":
      np.testing.assert_allclose(raw, expected, atol=1e-5)
    norms = np.linalg.norm(raw, axis=1) * np.linalg.norm(expected, axis=1)
    found[precision] = np.sum(raw * expected, axis=1) / norms
  assert found["float16"].min() > 0.9999
  assert found["int8"].min() > 0.99
  assert sizes["float32"] > 1.5 * sizes["float16"] > 1.5 * sizes["int8"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")  # 2.21's
def test_an_int8_file_takes_and_returns_integers_and_has_no_other_operation(
  tmp_path: pathlib.Path,
):
  path = str(tmp_path / "model.tflite")
  served = _served("mobilefacenet", 16, normalize=False)
  tflite_file.write(served, path, precision="int8", calibration=_images(16, 8))
  interpreter = tf.lite.Interpreter(path)
  (takes,), (returns,) = (
    interpreter.get_input_details(),
    interpreter.get_output_details(),
  )
  assert (takes["dtype"], takes["shape"].tolist()) == (np.uint8, [1, 16, 16, 3])
  assert (returns["dtype"], returns["shape"].tolist()) == (np.int8, [1, 24])
  assert takes["quantization"] == (1.0, 0)  # pixels go in as they are
  kinds = {each["dtype"] for each in interpreter.get_tensor_details()}
  assert kinds <= {np.uint8, np.int8, np.int32}


def test_a_library_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setitem(sys.modules, "tf2onnx", None)
  with pytest.raises(errors.UsageError, match=r"pip install 'facedist\[onnx\]'"):
    onnx_file.check_installed()
