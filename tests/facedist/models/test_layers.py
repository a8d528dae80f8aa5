import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, device_properties_pb2
from tensorflow.python.framework import meta_graph
from tensorflow.python.grappler import cluster, tf_optimizer

from facedist.models.backbones import layers

RNG = np.random.default_rng(0)
SHAPE = 8, 16, 16, 8
FEATURES = RNG.normal(size=SHAPE)
FEATURES[0, 0, 0] = 0.0
SLOPES = RNG.uniform(-0.5, 1.5, (1, 1, SHAPE[-1]))
UPSTREAM = RNG.normal(size=SHAPE)
TOLERANCES = {tf.float64: 1e-12, tf.float32: 1e-5, tf.float16: 1e-2, tf.bfloat16: 6e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_rectifier_and_its_gradients_are_those_of_the_equation(dtype: tf.DType):
  features, slopes = tf.cast(FEATURES, dtype), tf.cast(SLOPES, dtype)
  with tf.GradientTape() as tape:
    tape.watch([features, slopes])
    found = layers.rectify(features, slopes)
  gradients = tape.gradient(found, [features, slopes], tf.cast(UPSTREAM, dtype))
  is_positive = FEATURES > 0
  negatives = np.where(is_positive, 0, UPSTREAM * FEATURES)
  expected = (
    np.where(is_positive, FEATURES, SLOPES * FEATURES),
    np.where(is_positive, UPSTREAM, SLOPES * UPSTREAM),
    negatives.sum((0, 1, 2))[np.newaxis, np.newaxis],
  )
  for actual, wanted in zip((found, *gradients), expected, strict=True):
    assert actual.dtype == dtype
    error = np.max(abs(tf.cast(actual, tf.float64) - wanted))
    assert error < TOLERANCES[dtype] * np.max(abs(wanted))


def test_the_rectifier_passes_on_what_is_not_finite():
  features = tf.constant([np.nan, np.inf, -np.inf], shape=(1, 1, 3, 1))
  found = layers.rectify(features, tf.constant(0.25, shape=(1, 1, 1)))
  np.testing.assert_array_equal(found.numpy().ravel(), [np.nan, np.inf, -np.inf])


def test_the_layer_has_the_weights_and_the_output_of_keras_own():
  features = tf.cast(FEATURES, tf.float32)
  keras_own = tf.keras.layers.PReLU(shared_axes=(1, 2), name="prelu")
  ours = layers.PReLU(shared_axes=(1, 2), name="prelu")
  for layer in (keras_own, ours):
    layer.build(SHAPE)
    layer.set_weights([SLOPES])
  assert ours.weights[0].name == keras_own.weights[0].name
  np.testing.assert_allclose(ours(features), keras_own(features), rtol=1e-6)


def test_gpus_get_the_convolutions_around_a_rectifier_in_their_own_layout():
  """The layout optimizer needs a GPU's description, not the GPU."""
  with tf.Graph().as_default() as graph, tf.device("/device:GPU:0"):
    features = tf.compat.v1.placeholder(tf.float32, SHAPE)
    kernel = tf.ones((3, 3, SHAPE[-1], SHAPE[-1]))
    slopes = tf.constant(SLOPES, tf.float32)
    inner = layers.rectify(tf.nn.conv2d(features, kernel, 1, "SAME"), slopes)
    outer = tf.nn.conv2d(inner, kernel, 1, "SAME")
    gradients = tf.gradients(outer, [features, kernel, slopes])
    results = [tf.identity(each) for each in (outer, *gradients)]
  optimized = optimize_layout(graph, results)
  layouts = [node.attr["data_format"].s for node in optimized if "Conv2D" in node.op]
  assert layouts == [b"NCHW"] * 6


def optimize_layout(graph: tf.Graph, results: list[tf.Tensor]) -> list:
  """Returns the nodes that TensorFlow would run on a machine with a GPU.

  Raises:
    tf.errors.InvalidArgumentError: The layout optimizer failed.
  """
  description = meta_graph.create_meta_graph_def(graph=graph)
  wanted = description.collection_def["train_op"].node_list
  wanted.value.extend(result.op.name for result in results)
  settings = config_pb2.ConfigProto()
  rewrites = settings.graph_options.rewrite_options
  rewrites.optimizers.append("layout")
  rewrites.min_graph_nodes = -1
  rewrites.fail_on_optimizer_errors = True
  devices = cluster.Cluster(devices=[described("CPU"), described("GPU")])
  rewritten = tf_optimizer.OptimizeGraph(settings, description, cluster=devices)
  return list(rewritten.node)


def described(kind: str) -> device_properties_pb2.NamedDevice:
  properties = device_properties_pb2.DeviceProperties(
    type=kind,
    num_cores=8,
    frequency=1000,  # MHz
    bandwidth=10**7,  # KB/s
    memory_size=2**33,
    environment={"architecture": "9.0"},
  )
  name = f"/job:localhost/replica:0/task:0/device:{kind}:0"
  return device_properties_pb2.NamedDevice(name=name, properties=properties)
