import pathlib
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from facedist import errors, storage
from facedist.models import network, pretrained
from tests import files

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)
KERAS_FILES = ("w.h5", "w.weights.h5", "w.keras")

pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")


def network_of(backbone: str, image_size: int = 32) -> network.FaceNetwork:
  return network.build_network(
    backbone=backbone, image_size=image_size, embedding_size=8, policy="float32"
  )


@pytest.fixture(scope="module")
def source() -> network.FaceNetwork:
  return network_of("mobilefacenet")


@pytest.fixture(scope="module")
def target() -> network.FaceNetwork:
  return network_of("mobilefacenet")


Write = Callable[[network.FaceNetwork, pathlib.Path], object]
Load = Callable[[str, Write], network.FaceNetwork]


@pytest.fixture
def load(source, target, tmp_path: pathlib.Path) -> Load:
  """Writes a file, and reads it into a network whose weights were zero."""

  def load_file(name: str, write: Write) -> network.FaceNetwork:
    write(source, tmp_path / name)
    for weight in target.backbone.weights:
      weight.assign(tf.zeros_like(weight))
    pretrained.load_weights_file(target, str(tmp_path / name))
    return target

  return load_file


def assert_same_weights(left: network.FaceNetwork, right: network.FaceNetwork) -> None:
  pairs = zip(left.backbone.get_weights(), right.backbone.get_weights(), strict=True)
  for one, other in pairs:
    np.testing.assert_array_equal(one, other)


def save(model: tf.keras.Model, path: pathlib.Path) -> None:
  """Saves a model in the format of the path's ending, its weights alone in .h5."""
  (model.save if path.suffix == ".keras" else model.save_weights)(str(path))


def backbone(source: network.FaceNetwork, path: pathlib.Path) -> None:
  save(source.backbone, path)


def with_layers_after(source: network.FaceNetwork, path: pathlib.Path) -> None:
  features = source.backbone.output
  whole = tf.keras.Model(source.backbone.input, source.embedding(features))
  whole.save(str(path))


def as_a_layer(source: network.FaceNetwork, path: pathlib.Path) -> None:
  layers = [tf.keras.Input((32, 32, 3)), source.backbone, tf.keras.layers.Flatten()]
  save(tf.keras.Sequential(layers), path)
  if path.suffix == ".keras":
    as_keras_3(path)


def as_keras_3(path: pathlib.Path) -> None:
  """Marks a .keras file as written by Keras 3, which stores weights the same way."""
  with zipfile.ZipFile(path) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  members["metadata.json"] = b'{"keras_version": "3.15.1", "date_saved": "today"}'
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in members.items():
      archive.writestr(name, content)


@pytest.mark.parametrize(
  ("name", "write"),
  [
    *((name, backbone) for name in KERAS_FILES),
    ("model.h5", lambda source, path: source.backbone.save(str(path))),
    ("more.keras", with_layers_after),
    ("whole.weights.h5", as_a_layer),
    ("whole.keras", as_a_layer),
  ],
)
def test_a_backbone_is_read_alone_or_as_a_part_from_each_of_keras_formats(
  name: str, write: Write, source: network.FaceNetwork, load: Load
):
  assert_same_weights(load(name, write), source)


def test_weights_are_read_from_a_bucket(bucket, source, target, tmp_path):
  backbone(source, tmp_path / "w.h5")
  storage.upload(str(tmp_path / "w.h5"), f"{bucket}/w.h5")
  pretrained.load_weights_file(target, f"{bucket}/w.h5")
  assert_same_weights(target, source)


def test_resnet50_from_a_keras_file_equals_keras_applications_on_raw_pixels(
  tmp_path: pathlib.Path,
):
  tf.keras.utils.set_random_seed(1)
  keras_own = tf.keras.applications.ResNet50(
    include_top=False, weights=None, input_shape=(64, 64, 3)
  )
  path = tmp_path / "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
  save(keras_own, path)
  built = network_of("resnet50", 64)
  pretrained.load_weights_file(built, str(path))
  prepared = tf.keras.applications.resnet50.preprocess_input(PIXELS.copy())
  np.testing.assert_allclose(
    built.backbone(PIXELS), keras_own(prepared), rtol=1e-4, atol=1e-5
  )


def test_imagenet_weights_that_cannot_be_downloaded_say_how_to_copy_the_file(
  monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
  # a home without Keras' cache, and a proxy that is not running
  monkeypatch.setenv("KERAS_HOME", str(tmp_path))
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
  monkeypatch.setenv("no_proxy", "")
  built = network_of("resnet50")
  with pytest.raises(errors.UsageError, match=r"notop\.h5 .*--backbone_weights=FILE"):
    pretrained.load_weights_file(built, "imagenet")


def test_there_are_no_imagenet_weights_for_other_backbones():
  with pytest.raises(errors.UsageError, match="none for --backbone=tinynet"):
    pretrained.check_weights_file("tinynet", "imagenet")


def another(source: network.FaceNetwork, path: pathlib.Path) -> None:
  save(tf.keras.Sequential([tf.keras.layers.Dense(3, input_shape=(2,))]), path)
  if path.suffix == ".keras":
    as_keras_3(path)


def pointer(source: network.FaceNetwork, path: pathlib.Path) -> None:
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def flipped(source: network.FaceNetwork, path: pathlib.Path) -> None:
  """In the middle a .keras has its checksum, in its beginning an .h5 its tables."""
  backbone(source, path)
  place = path.stat().st_size // 2 if path.suffix == ".keras" else 9
  files.flip_byte(path, place)


def half(source: network.FaceNetwork, path: pathlib.Path) -> None:
  backbone(source, path)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def not_finite(source: network.FaceNetwork, path: pathlib.Path) -> None:
  values = source.backbone.get_weights()
  for place, value in ((3, np.nan), (5, np.inf)):
    weight = source.backbone.weights[place]
    weight.assign(tf.fill(weight.shape, value))
  backbone(source, path)
  source.backbone.set_weights(values)


def empty(source: network.FaceNetwork, path: pathlib.Path) -> None:
  path.write_bytes(b"")


@pytest.mark.parametrize(
  ("name", "write", "says"),
  [
    ("gone.h5", lambda source, path: None, r"gone\.h5 is not a file; give"),
    ("w.bin", pointer, r"w\.bin has an unknown ending.*\.safetensors"),
    ("w.h5", another, r"w\.h5 does not fit"),
    ("w.keras", another, r"w\.keras \(of Keras 3\.15\.1\)"),
    # a file of this format has no names of layers that match
    ("w.h5", with_layers_after, r"w\.h5 does not fit.* this backbone"),
    *((name, pointer, f"{name} is a Git LFS pointer") for name in KERAS_FILES),
    *(
      (name, not_finite, "stem_conv_bn/.* has values that are") for name in KERAS_FILES
    ),
    *(
      (name, corrupt, "is corrupt or does not fit")
      for name in KERAS_FILES
      for corrupt in (flipped, half, empty)
    ),
  ],
)
def test_a_file_without_weights_of_the_backbone_is_refused_in_one_line(
  name: str, write: Write, says: str, load: Load
):
  with pytest.raises(errors.UsageError, match=says) as caught:
    load(name, write)
  assert "\n" not in str(caught.value)
