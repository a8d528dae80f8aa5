"""Parameters and multiply-adds of a network."""

import math

import tensorflow as tf

_BATCH_NORM_AVERAGES = ("moving_mean", "moving_variance")


def parameters(*models: tf.keras.Model) -> int:
  """Counts the weights that training can change: all but batch norm's averages."""
  weights = [weight for model in models for weight in model.weights]
  return sum(
    math.prod(weight.shape)
    for weight in weights
    if _last_part(weight) not in _BATCH_NORM_AVERAGES
  )


def multiply_adds(*models: tf.keras.Model) -> int:
  """Counts the multiply-adds of one image in convolutions and linear layers.

  Papers call these FLOPs or MAdds; normalisation and rectifiers do not count. Each
  element of a kernel is used once at every place of the output.
  """
  return sum(_of_layer(layer) for model in models for layer in model.layers)


def _of_layer(layer: tf.keras.layers.Layer) -> int:
  """Returns the multiply-adds of one layer; 0 for those without a kernel."""
  places = math.prod(layer.output_shape[1:-1]) if layer.weights else 0
  kernels = [
    weight for weight in layer.weights if _last_part(weight).endswith("kernel")
  ]
  return places * sum(math.prod(kernel.shape) for kernel in kernels)


def _last_part(weight: tf.Variable) -> str:
  """Returns `kernel` of `conv1/kernel:0`."""
  return weight.name.split(":")[0].rsplit("/", 1)[-1]
