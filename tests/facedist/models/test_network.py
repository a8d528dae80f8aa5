import numpy as np
import pytest
import tensorflow as tf

from facedist.models import network


def build(**changes: object) -> network.FaceNetwork:
  arguments: dict = {
    "backbone": "tinynet",
    "image_size": 32,
    "embedding_size": 16,
    "policy": "float32",
  }
  return network.build_network(**(arguments | changes))


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(
  ("policy", "inner"),
  [
    ("float32", tf.float32),
    ("mixed_float16", tf.float16),
    ("mixed_bfloat16", tf.bfloat16),
  ],
)
@pytest.mark.parametrize("pooling", ["avg", "flatten"])
def test_weights_and_embeddings_are_float32_under_every_policy(
  policy: str, inner: tf.DType, pooling: str
):
  built = build(policy=policy, pooling=pooling)
  assert tf.keras.mixed_precision.global_policy().name == "float32"  # put back
  assert built.backbone(IMAGES.astype(np.float32)).dtype == inner
  assert {weight.dtype for weight in built.backbone.weights} == {tf.float32}
  embeddings = built.embed(IMAGES)
  assert embeddings.dtype == tf.float32
  assert embeddings.shape == (3, 16)


def test_uint8_pixels_and_the_same_as_float_embed_alike():
  built = build()
  np.testing.assert_array_equal(
    built.embed(IMAGES), built.embed(IMAGES.astype(np.float32))
  )


@pytest.mark.parametrize(
  ("backbone", "kinds"),
  [
    ("resnet50", set()),
    ("iresnet18", {"PReLU"}),
    ("mobilefacenet", {"PReLU", "DepthwiseConv2D"}),
  ],
)
def test_weight_decay_is_of_kernels_and_not_of_biases_batch_norm_and_slopes(
  backbone: str, kinds: set[str]
):
  built = build(backbone=backbone)
  layers = [*built.backbone.layers, *built.embedding.layers]
  for layer in layers:
    kernel = getattr(layer, "depthwise_kernel", getattr(layer, "kernel", None))
    for variable in layer.weights:
      assert network.is_decayed(variable) == (variable is kernel), variable.name
  bases = {base.__name__ for layer in layers for base in type(layer).__mro__}
  assert bases >= {"Conv2D", "BatchNormalization", *kinds}


def test_batch_norm_momentum_reaches_every_layer():
  built = build(backbone="resnet50", batch_norm_momentum=0.8)
  norms = [
    layer
    for layer in (*built.backbone.layers, *built.embedding.layers)
    if isinstance(layer, tf.keras.layers.BatchNormalization)
  ]
  assert len(norms) == 54  # 53 of ResNet50 and one after the embedding
  assert {layer.momentum for layer in norms} == {0.8}


def test_dropout_in_training_asks_for_draws_and_needs_none_elsewhere():
  built = build(dropout=0.5)
  with pytest.raises(ValueError, match="a draw for each sample"):
    built.embed(IMAGES, training=True)
  assert np.isfinite(built.embed(IMAGES)).all()


@pytest.mark.parametrize("pooling", ["avg", "flatten", "e_type", "gdconv"])
def test_dropout_follows_the_draws(pooling: str):
  built = build(dropout=0.5, pooling=pooling, embedding_batch_norm=False)
  first, again, other = (
    built.embed(
      IMAGES, training=True, training_backbone=False, draws=tf.constant(draws)
    )
    for draws in ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.1, 0.2, 0.4])
  )
  np.testing.assert_array_equal(first, again)
  assert not np.allclose(first[2], other[2])
  if pooling in ("avg", "flatten"):  # the others have a batch norm over the batch
    np.testing.assert_allclose(first[:2], other[:2], rtol=1e-5)
