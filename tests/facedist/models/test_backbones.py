import numpy as np
import pytest
import tensorflow as tf

from facedist import errors
from facedist.models import network
from facedist.models.backbones import registry

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)


def test_an_unknown_backbone_lists_the_known_ones():
  with pytest.raises(
    errors.UsageError, match=r"iresnet100, .*mobilefacenet, resnet50, tinynet"
  ):
    registry.build("resnet51", 112)


def test_images_too_small_for_a_backbone_are_refused():
  with pytest.raises(errors.UsageError, match="at least 32 pixels, not 16"):
    registry.build("resnet50", 16)


def test_tinynet_embeds_an_image_the_same_in_any_batch():
  backbone = registry.build("tinynet", 64)
  together = backbone(PIXELS, training=True)
  alone = backbone(PIXELS[:1], training=True)
  np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("name", "layer", "says", "normalised"),
  [
    ("iresnet18", "centred", "(x - 127.5) / 127.5", [-1, 0, 1]),
    ("mobilefacenet", "centred", "(x - 127.5) / 127.5", [-1, 0, 1]),
    ("tinynet", "centred", "(x - 127.5) / 127.5", [-1, 0, 1]),
    ("vgg8", "unit_range", "x / 255", [0, 0.5, 1]),
    (
      "resnet50",
      "bgr_means",
      "BGR of x, minus (103.939, 116.779, 123.68)",
      [255 - 103.939, 127.5 - 116.779, -123.68],
    ),
  ],
)
def test_pixels_are_normalised_as_the_registry_says(name, layer, says, normalised):
  assert registry.BACKBONES[name].pixel_normalization == says
  built = registry.build(name, 32)
  found = built.get_layer(layer)(tf.constant([[[[0.0, 127.5, 255.0]]]]))
  np.testing.assert_allclose(found[0, 0, 0], normalised, atol=1e-4)


def test_tinynet_has_the_size_its_docstring_says():
  assert registry.build("tinynet", 112).count_params() == pytest.approx(0.8e6, rel=0.1)


@pytest.mark.parametrize(
  ("name", "size", "shape"),
  [
    ("iresnet18", 16, (1, 1, 512)),
    ("iresnet18", 32, (2, 2, 512)),
    ("iresnet18", 48, (3, 3, 512)),
    ("mobilefacenet", 16, (1, 1, 512)),
    ("mobilefacenet", 64, (4, 4, 512)),
    ("resnet50", 33, (2, 2, 2048)),
    ("vgg8", 8, (1, 1, 64)),
    ("vgg8", 28, (3, 3, 64)),
    ("vgg8", 31, (3, 3, 64)),
    ("tinynet", 64, (4, 4, 192)),
  ],
)
def test_a_backbone_takes_every_size_its_stride_allows(
  name: str, size: int, shape: tuple[int, ...]
):
  assert registry.build(name, size).output_shape[1:] == shape


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet"])
def test_a_size_that_the_stride_does_not_divide_is_refused_with_one_that_fits(
  name: str,
):
  with pytest.raises(errors.UsageError, match=r"multiple of 16 pixels.*image_size=96"):
    registry.build(name, 100)


@pytest.mark.parametrize(
  ("name", "low", "high"),
  [
    ("iresnet18", -1.0, 1.0),
    ("mobilefacenet", -1.0, 1.0),
    ("tinynet", -1.0, 1.0),
    ("vgg8", 0.0, 1.0),
  ],
)
def test_a_backbone_brings_pixels_to_its_own_range(name: str, low: float, high: float):
  built = registry.build(name, 32)
  rescale = next(
    layer for layer in built.layers if isinstance(layer, tf.keras.layers.Rescaling)
  )
  np.testing.assert_allclose(rescale(tf.constant([0.0, 255.0])), [low, high], atol=1e-6)


@pytest.mark.parametrize("name", sorted(registry.BACKBONES))
def test_every_backbone_embeds_and_trains_with_its_own_output(name: str):
  built = network.build_network(
    backbone=name, image_size=32, embedding_size=8, policy="float32"
  )
  with tf.GradientTape() as tape:
    images = PIXELS[:, :32, :32]
    draws = np.linspace(0.1, 0.9, len(images), dtype=np.float32)
    loss = tf.reduce_sum(built.embed(images, training=True, draws=draws) ** 2)
  gradients = tape.gradient(loss, built.backbone.trainable_variables)
  assert np.isfinite(loss)
  assert all(gradient is not None for gradient in gradients)


def test_layers_up_to_the_named_one_neither_train_nor_update_their_statistics():
  built = registry.build("iresnet18", 32)
  registry.freeze(built, "layer2_0_bn1")
  trained = {variable.name.split("/")[0] for variable in built.trainable_variables}
  assert {"conv1", "bn1", "layer1_1_conv2", "layer2_0_bn1"}.isdisjoint(trained)
  assert {"layer2_0_conv1", "layer4_1_bn3"} <= trained
  before = {weight.name: weight.numpy() for weight in built.weights}
  built(PIXELS[:, :32, :32], training=True)
  moved = {
    weight.name.split("/")[0]
    for weight in built.weights
    if not np.array_equal(before[weight.name], weight)
  }
  assert {"bn1", "layer1_0_bn1", "layer2_0_bn1"}.isdisjoint(moved)
  assert "layer2_0_bn2" in moved


def test_freezing_until_an_unknown_layer_lists_similar_names():
  with pytest.raises(errors.UsageError, match=r"layer9_0_bn1 is not a layer.*_0_bn1"):
    registry.freeze(registry.build("iresnet18", 32), "layer9_0_bn1")


def test_freezing_all_of_a_backbone_is_refused():
  with pytest.raises(errors.UsageError, match="--full_epochs=0"):
    registry.freeze(registry.build("vgg8", 28), "block3_pool")
