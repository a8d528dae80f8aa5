import numpy as np
import pytest
import tensorflow as tf

from facedist import errors
from facedist.models import network
from facedist.models.backbones import iresnet, registry

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)


def test_tinynet_embeds_an_image_the_same_in_any_batch():
  backbone = registry.build("tinynet", 64)
  together = backbone(PIXELS, training=True)
  alone = backbone(PIXELS[:1], training=True)
  np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("name", "layer", "says", "normalised"),
  [
    *(
      (name, "centred", "(x - 127.5) / 127.5", [-1, 0, 1])
      for name in ("iresnet18", "mobilefacenet", "tinynet")
    ),
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


@pytest.mark.parametrize(
  ("name", "size", "shape"),
  [
    ("iresnet18", 16, (1, 1, 512)),
    ("iresnet18", 48, (3, 3, 512)),
    ("mobilefacenet", 64, (4, 4, 512)),
    ("resnet50", 33, (2, 2, 2048)),
    ("vgg8", 8, (1, 1, 64)),
    ("vgg8", 31, (3, 3, 64)),
    ("tinynet", 64, (4, 4, 192)),
  ],
)
def test_a_backbone_takes_every_size_its_stride_allows(
  name: str, size: int, shape: tuple[int, ...]
):
  assert registry.build(name, size).output_shape[1:] == shape


@pytest.mark.parametrize(
  ("name", "size", "says"),
  [
    ("resnet51", 112, r"iresnet100, .*mobilefacenet, resnet50, tinynet"),
    ("resnet50", 16, "at least 32 pixels, not 16"),
    ("iresnet18", 100, r"multiple of 16 pixels.*image_size=96"),
    ("mobilefacenet", 100, r"multiple of 16 pixels.*image_size=96"),
  ],
)
def test_a_name_or_a_size_that_cannot_be_is_refused_with_what_can(
  name: str, size: int, says: str
):
  with pytest.raises(errors.UsageError, match=says):
    registry.build(name, size)


DEEPER = [*iresnet.UNITS][1:]  # they have more of iresnet18's layers


@pytest.mark.parametrize("name", [n for n in registry.BACKBONES if n not in DEEPER])
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
  before = built.get_weights()
  built(PIXELS[:, :32, :32], training=True)
  moved = {
    weight.name.split("/")[0]
    for weight, old in zip(built.weights, before, strict=True)
    if not np.array_equal(old, weight)
  }
  assert {"bn1", "layer1_0_bn1", "layer2_0_bn1"}.isdisjoint(moved)
  assert "layer2_0_bn2" in moved


@pytest.mark.parametrize(
  ("name", "size", "until", "says"),
  [
    ("iresnet18", 32, "layer9_0_bn1", r"layer9_0_bn1 is not a layer.*_0_bn1"),
    ("vgg8", 28, "block3_pool", "--full_epochs=0"),
  ],
)
def test_freezing_until_an_unknown_layer_or_the_last_is_refused(
  name: str, size: int, until: str, says: str
):
  with pytest.raises(errors.UsageError, match=says):
    registry.freeze(registry.build(name, size), until)
