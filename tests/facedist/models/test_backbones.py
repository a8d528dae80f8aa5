import pathlib

import numpy as np
import pytest
import tensorflow as tf

from facedist import errors, storage
from facedist.models import backbones

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)


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
  backbone = backbones.build("resnet50", 64)
  backbones.load_weights(backbone, path)
  prepared = tf.keras.applications.resnet50.preprocess_input(PIXELS.copy())
  np.testing.assert_allclose(
    backbone(PIXELS), keras_resnet50(prepared), rtol=1e-4, atol=1e-5
  )


def test_weights_of_another_network_are_refused_by_name(tmp_path: pathlib.Path):
  path = str(tmp_path / "other.h5")
  tf.keras.Sequential([tf.keras.layers.Dense(3, input_shape=(2,))]).save_weights(path)
  with pytest.raises(errors.UsageError, match=r"other\.h5 does not fit"):
    backbones.load_weights(backbones.build("tinynet", 32), path)


def test_a_weights_file_that_is_not_there_is_refused():
  with pytest.raises(errors.UsageError, match=r"=gone\.h5 is no file; give"):
    backbones.load_weights(backbones.build("tinynet", 32), "gone.h5")


def test_imagenet_weights_that_cannot_be_downloaded_say_how_to_bring_the_file(
  monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
  # a home without Keras' cache, and a proxy that nobody answers at
  monkeypatch.setenv("KERAS_HOME", str(tmp_path))
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
  monkeypatch.setenv("no_proxy", "")
  backbone = backbones.build("resnet50", 32)
  with pytest.raises(errors.UsageError, match=r"notop\.h5 .*--backbone_weights=FILE"):
    backbones.load_weights(backbone, "imagenet")


def test_there_are_no_imagenet_weights_for_tinynet():
  with pytest.raises(errors.UsageError, match="none for --backbone=tinynet"):
    backbones.load_weights(backbones.build("tinynet", 32), "imagenet")


def test_an_unknown_backbone_lists_the_known_ones():
  with pytest.raises(errors.UsageError, match="choose one of resnet50, tinynet"):
    backbones.build("resnet51", 112)


def test_images_too_small_for_a_backbone_are_refused():
  with pytest.raises(errors.UsageError, match="at least 32 pixels, not 16"):
    backbones.build("resnet50", 16)


def test_tinynet_embeds_an_image_the_same_in_any_batch():
  backbone = backbones.build("tinynet", 64)
  together = backbone(PIXELS, training=True)
  alone = backbone(PIXELS[:1], training=True)
  np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_tinynet_has_the_size_its_docstring_says():
  assert backbones.build("tinynet", 112).count_params() == pytest.approx(0.8e6, rel=0.1)


def test_weights_are_brought_from_a_bucket(bucket, tmp_path):
  source, target = (backbones.build("tinynet", 32) for _ in range(2))
  source.save_weights(str(tmp_path / "w.h5"))
  storage.upload(str(tmp_path / "w.h5"), f"{bucket}/w.h5")
  backbones.load_weights(target, f"{bucket}/w.h5")
  for wanted, loaded in zip(source.get_weights(), target.get_weights(), strict=True):
    np.testing.assert_array_equal(loaded, wanted)
