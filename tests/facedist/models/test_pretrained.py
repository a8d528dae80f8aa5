import pathlib
import zipfile

import numpy as np
import pytest
import tensorflow as tf

from facedist import errors, storage
from facedist.models import network, pretrained

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)


def network_of(backbone: str, image_size: int) -> network.FaceNetwork:
  return network.build_network(
    backbone=backbone, image_size=image_size, embedding_size=8, policy="float32"
  )


def assert_same_weights(left: tf.keras.Model, right: tf.keras.Model) -> None:
  for one, other in zip(left.get_weights(), right.get_weights(), strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def keras_resnet50() -> tf.keras.Model:
  tf.keras.utils.set_random_seed(1)
  return tf.keras.applications.ResNet50(
    include_top=False, weights=None, input_shape=(64, 64, 3)
  )


def test_resnet50_from_a_keras_file_equals_keras_applications_on_raw_pixels(
  keras_resnet50: tf.keras.Model, tmp_path: pathlib.Path
):
  path = str(tmp_path / "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5")
  keras_resnet50.save_weights(path)
  built = network_of("resnet50", 64)
  pretrained.load_weights_file(built, path)
  prepared = tf.keras.applications.resnet50.preprocess_input(PIXELS.copy())
  np.testing.assert_allclose(
    built.backbone(PIXELS), keras_resnet50(prepared), rtol=1e-4, atol=1e-5
  )


def test_weights_of_another_network_are_refused_by_name(tmp_path: pathlib.Path):
  path = str(tmp_path / "other.h5")
  tf.keras.Sequential([tf.keras.layers.Dense(3, input_shape=(2,))]).save_weights(path)
  with pytest.raises(errors.UsageError, match=r"other\.h5 does not fit"):
    pretrained.load_weights_file(network_of("tinynet", 32), path)


def test_a_weights_file_that_is_not_there_is_refused():
  with pytest.raises(errors.UsageError, match=r"=gone\.h5 is not a file; give"):
    pretrained.load_weights_file(network_of("tinynet", 32), "gone.h5")


def test_imagenet_weights_that_cannot_be_downloaded_say_how_to_copy_the_file(
  monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
  # a home without Keras' cache, and a proxy that is not running
  monkeypatch.setenv("KERAS_HOME", str(tmp_path))
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
  monkeypatch.setenv("no_proxy", "")
  built = network_of("resnet50", 32)
  with pytest.raises(errors.UsageError, match=r"notop\.h5 .*--backbone_weights=FILE"):
    pretrained.load_weights_file(built, "imagenet")


def test_there_are_no_imagenet_weights_for_tinynet():
  with pytest.raises(errors.UsageError, match="none for --backbone=tinynet"):
    pretrained.load_weights_file(network_of("tinynet", 32), "imagenet")


def test_weights_are_read_from_a_bucket(bucket, tmp_path):
  source, target = (network_of("tinynet", 32) for _ in range(2))
  source.backbone.save_weights(str(tmp_path / "w.h5"))
  storage.upload(str(tmp_path / "w.h5"), f"{bucket}/w.h5")
  pretrained.load_weights_file(target, f"{bucket}/w.h5")
  assert_same_weights(target.backbone, source.backbone)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.parametrize(
  "name", ["old.h5", "new.weights.h5", "model.h5", "model.keras"]
)
def test_a_backbone_is_read_from_each_of_keras_formats(
  name: str, tmp_path: pathlib.Path
):
  source, target = (network_of("mobilefacenet", 32) for _ in range(2))
  path = str(tmp_path / name)
  if name in ("old.h5", "new.weights.h5"):
    source.backbone.save_weights(path)
  else:
    source.backbone.save(path)
  pretrained.load_weights_file(target, path)
  assert_same_weights(target.backbone, source.backbone)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
def test_a_backbone_with_layers_after_it_is_read_from_keras_own_format_alone(
  tmp_path: pathlib.Path,
):
  source, target = (network_of("tinynet", 32) for _ in range(2))
  features = source.backbone.output
  whole = tf.keras.Model(source.backbone.input, source.embedding(features))
  whole.save(str(tmp_path / "whole.keras"))
  whole.save(str(tmp_path / "whole.h5"))
  pretrained.load_weights_file(target, str(tmp_path / "whole.keras"))
  assert_same_weights(target.backbone, source.backbone)
  with pytest.raises(
    errors.UsageError, match=r"whole\.h5 does not fit.* this backbone"
  ):
    pretrained.load_weights_file(target, str(tmp_path / "whole.h5"))


def test_a_file_of_an_unknown_ending_is_refused(tmp_path: pathlib.Path):
  (tmp_path / "w.bin").write_bytes(b"")
  with pytest.raises(
    errors.UsageError, match=r"w\.bin has an unknown ending.*\.safetensors"
  ):
    pretrained.load_weights_file(network_of("tinynet", 32), str(tmp_path / "w.bin"))


KERAS_FILES = ("w.h5", "w.weights.h5", "w.keras")


def save(backbone: tf.keras.Model, path: str) -> None:
  """Saves a backbone in the format of the path's ending."""
  (backbone.save if path.endswith(".keras") else backbone.save_weights)(path)


@pytest.mark.parametrize("name", KERAS_FILES)
def test_weights_that_are_not_finite_are_refused_by_the_first_s_name(
  name: str, tmp_path: pathlib.Path
):
  source, path = network_of("tinynet", 32).backbone, str(tmp_path / name)
  broken = source.weights[3]
  broken.assign(tf.fill(broken.shape, np.nan))
  source.weights[5].assign(tf.fill(source.weights[5].shape, np.inf))
  save(source, path)
  reason = rf"{broken.name.split(':')[0]} has values that are not finite"
  with pytest.raises(errors.UsageError, match=reason):
    pretrained.load_weights_file(network_of("tinynet", 32), path)


@pytest.mark.parametrize("name", KERAS_FILES)
def test_a_corrupt_file_is_reported_in_one_line(name: str, tmp_path: pathlib.Path):
  built, path = network_of("tinynet", 32), tmp_path / name
  save(built.backbone, str(path))
  whole = path.read_bytes()
  # In the middle a .keras has its checksum, in its beginning an .h5 its tables.
  flipped = len(whole) // 2 if name == "w.keras" else 9
  for corrupt in (
    whole[:flipped] + bytes([whole[flipped] ^ 255]) + whole[flipped + 1 :],
    whole[: len(whole) // 2],
    b"",
  ):
    path.write_bytes(corrupt)
    with pytest.raises(errors.UsageError, match="is corrupt or does not fit") as caught:
      pretrained.load_weights_file(built, str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", KERAS_FILES)
def test_a_git_lfs_pointer_is_called_that(name: str, tmp_path: pathlib.Path):
  path = tmp_path / name
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
  with pytest.raises(errors.UsageError, match=rf"{name} is a Git LFS pointer"):
    pretrained.load_weights_file(network_of("tinynet", 32), str(path))


def as_keras_3(path: pathlib.Path) -> None:
  """Marks a .keras file as written by Keras 3, which stores weights the same way."""
  with zipfile.ZipFile(path) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  members["metadata.json"] = b'{"keras_version": "3.15.1", "date_saved": "today"}'
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in members.items():
      archive.writestr(name, content)


@pytest.mark.parametrize("name", ["whole.keras", "whole.weights.h5"])
def test_a_backbone_that_is_a_layer_of_another_model_is_found(
  name: str, tmp_path: pathlib.Path
):
  source, target = (network_of("tinynet", 32) for _ in range(2))
  whole = tf.keras.Sequential(
    [tf.keras.Input((32, 32, 3)), source.backbone, tf.keras.layers.Flatten()]
  )
  path = tmp_path / name
  save(whole, str(path))
  if name.endswith(".keras"):
    as_keras_3(path)
  pretrained.load_weights_file(target, str(path))
  assert_same_weights(target.backbone, source.backbone)


def test_a_file_of_keras_3_for_another_backbone_is_called_that(tmp_path: pathlib.Path):
  network_of("tinynet", 32).backbone.save(tmp_path / "w.keras")
  as_keras_3(tmp_path / "w.keras")
  with pytest.raises(errors.UsageError, match=r"w\.keras \(of Keras 3\.15\.1\)"):
    pretrained.load_weights_file(
      network_of("mobilefacenet", 32), str(tmp_path / "w.keras")
    )
