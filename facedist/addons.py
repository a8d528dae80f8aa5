"""LAMB, the triplet losses and cutout, which TensorFlow itself lacks.

On the reference lane (TensorFlow 2.15) LAMB and the losses are tensorflow-addons'. Its
last version, 0.23, runs with no later TensorFlow, so where it cannot be imported the
functions of this module serve. Both compute the same, and a LAMB of either restores the
other's checkpoints. This is the only module that imports tensorflow_addons.
"""

import operator
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def get(name: str) -> Any:
  """Returns the class or function of a key of `FEATURES`: the package's, or our own."""
  path, own = FEATURES[name]
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # each import says that its development has ended
      import tensorflow_addons
  except ImportError:
    return own
  return operator.attrgetter(path)(tensorflow_addons)


class Lamb(tf.keras.optimizers.legacy.Optimizer):
  """LAMB (arXiv:1904.00962, algorithm 2) with φ(z) = z.

  Hyperparameters and slots have the names that tensorflow-addons gives them, which are
  the names in a checkpoint.
  """

  def __init__(
    self,
    *,
    learning_rate: float,
    weight_decay: float,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    exclude_from_weight_decay: Sequence[str],
    exclude_from_layer_adaptation: Sequence[str],
  ) -> None:
    """Sets the hyperparameters.

    Args:
      learning_rate: η.
      weight_decay: λ; decoupled from the gradient.
      beta_1: Decay of the first moment.
      beta_2: Decay of the second moment.
      epsilon: Added to the root of the second moment.
      exclude_from_weight_decay: Patterns of the names of variables that do not decay.
      exclude_from_layer_adaptation: Patterns of the names of variables whose trust
        ratio is 1.
    """
    super().__init__("LAMB")
    self._set_hyper("learning_rate", learning_rate)
    self._set_hyper("decay", self._initial_decay)  # 0; a checkpoint holds it
    self._set_hyper("beta_1", beta_1)
    self._set_hyper("beta_2", beta_2)
    self._set_hyper("weight_decay", weight_decay)
    self.epsilon = epsilon
    self._not_decayed = tuple(exclude_from_weight_decay)
    self._not_adapted = tuple(exclude_from_layer_adaptation)

  def _create_slots(self, var_list: Sequence[tf.Variable]) -> None:
    """Adds the two moments of each variable."""
    for slot in ("m", "v"):
      for variable in var_list:
        self.add_slot(variable, slot)

  def _resource_apply_dense(
    self, grad: tf.Tensor, var: tf.Variable, apply_state: Any = None
  ) -> tf.Operation:
    """Updates a variable and its moments."""
    dtype = var.dtype.base_dtype
    beta_1, beta_2 = (self._get_hyper(name, dtype) for name in ("beta_1", "beta_2"))
    step = tf.cast(self.iterations + 1, dtype)
    first, second = self.get_slot(var, "m"), self.get_slot(var, "v")
    mean = first.assign(first * beta_1 + grad * (1 - beta_1))
    square = second.assign(second * beta_2 + (grad * grad) * (1 - beta_2))
    update = (mean / (1.0 - tf.pow(beta_1, step))) / (
      tf.sqrt(square / (1.0 - tf.pow(beta_2, step))) + self.epsilon
    )
    if not _matches(self._not_decayed, var):
      update += self._get_hyper("weight_decay", dtype) * var
    ratio = 1.0 if _matches(self._not_adapted, var) else _trust_ratio(var, update)
    return var.assign(var - ratio * self._decayed_lr(dtype) * update)

  def get_config(self) -> dict[str, Any]:
    """Returns what Keras requires of an optimizer; none is made from it here."""
    names = ("learning_rate", "decay", "beta_1", "beta_2", "weight_decay")
    hyperparameters = {name: self._serialize_hyperparameter(name) for name in names}
    return {
      **super().get_config(),
      **hyperparameters,
      "epsilon": self.epsilon,
      "exclude_from_weight_decay": self._not_decayed,
      "exclude_from_layer_adaptation": self._not_adapted,
    }


def _matches(patterns: Sequence[str], variable: tf.Variable) -> bool:
  return any(re.search(pattern, variable.name) for pattern in patterns)


def _trust_ratio(variable: tf.Variable, update: tf.Tensor) -> tf.Tensor:
  """Returns ‖w‖ / ‖update‖, float[]; 1 where either is 0."""
  lengths = tf.norm(variable, ord=2), tf.norm(update, ord=2)
  is_ratio = (lengths[0] > 0) & (lengths[1] > 0)
  return tf.where(is_ratio, lengths[0] / lengths[1], 1.0)


def triplet_semihard_loss(
  y_true: tf.Tensor, y_pred: tf.Tensor, margin: float, distance_metric: str
) -> tf.Tensor:
  """Returns the mean loss of all pairs, each with a semi-hard negative.

  That is the nearest negative that is farther than the positive, or the farthest where
  none is (arXiv:1503.03832, section 3). Its memory grows by the square of the batch.

  Args:
    y_true: int[batch] labels, of two identities or more, one of them twice or more.
    y_pred: float32[batch, embedding], of norm 1.
    margin: In the distance of the metric.
    distance_metric: `L2` or `squared-L2`.

  Returns:
    float32[].
  """
  distances = _distances(y_pred, distance_metric)
  is_same = y_true[:, None] == y_true[None, :]
  num_negatives = tf.math.count_nonzero(~is_same, axis=1, dtype=tf.int32)
  # Each row: its negatives from near to far, then what is no negative.
  negatives = tf.sort(tf.where(is_same, float("inf"), distances), axis=1)
  farther = tf.searchsorted(negatives, distances, side="right")
  chosen = tf.minimum(farther, num_negatives[:, None] - 1)
  negative = tf.gather(negatives, chosen, batch_dims=1)
  is_pair = tf.linalg.set_diag(is_same, tf.zeros_like(y_true, tf.bool))
  losses = tf.where(is_pair, tf.maximum(distances - negative + margin, 0.0), 0.0)
  return tf.reduce_sum(losses) / tf.math.count_nonzero(is_pair, dtype=losses.dtype)


def triplet_hard_loss(
  y_true: tf.Tensor, y_pred: tf.Tensor, margin: float, distance_metric: str
) -> tf.Tensor:
  """Returns the mean loss of all anchors, each with its hardest triplet.

  That is its farthest positive, or a distance of 0 where it has none, and its nearest
  negative (arXiv:1703.07737, section 2).

  Args:
    y_true: int[batch] labels, of two identities or more.
    y_pred: float32[batch, embedding], of norm 1.
    margin: In the distance of the metric.
    distance_metric: `L2` or `squared-L2`.

  Returns:
    float32[].
  """
  distances = _distances(y_pred, distance_metric)
  is_same = y_true[:, None] == y_true[None, :]
  positive = tf.reduce_max(tf.where(is_same, distances, 0.0), axis=1)
  negative = tf.reduce_min(tf.where(is_same, float("inf"), distances), axis=1)
  return tf.reduce_mean(tf.maximum(positive - negative + margin, 0.0))


def _distances(vectors: tf.Tensor, metric: str) -> tf.Tensor:
  """Returns float32[batch, batch]; 0 has a gradient of zero, also under the root."""
  squares = tf.reduce_sum(tf.square(vectors), axis=1)
  products = tf.matmul(vectors, vectors, transpose_b=True)
  squared = tf.maximum(squares[:, None] + squares[None, :] - 2.0 * products, 0.0)
  squared = tf.linalg.set_diag(squared, tf.zeros_like(squares))
  if metric == "squared-L2":
    return squared
  is_zero = squared <= 0.0
  return tf.where(is_zero, 0.0, tf.sqrt(tf.where(is_zero, 1.0, squared)))


def cutout(
  images: tf.Tensor, mask_size: int, offset: tf.Tensor, constant_values: float = 0.0
) -> tf.Tensor:
  """Fills a square of each image (cutout, arXiv:1708.04552).

  It equals tensorflow-addons' function, which makes the images' masks one by one and
  is not used for that reason.

  Args:
    images: float32[batch, height, width, channels].
    mask_size: Side of the square in pixels, even. What lies outside is cut off.
    offset: int32[batch, 2], row and column of the square's centre.
    constant_values: What fills it.
  """
  inside = [
    tf.abs(2 * (tf.range(size) - offset[:, axis, None]) + 1) < mask_size
    for axis, size in enumerate(images.shape[1:3])
  ]
  is_filled = inside[0][:, :, None, None] & inside[1][:, None, :, None]
  return tf.where(is_filled, tf.constant(constant_values, images.dtype), images)


FEATURES: dict[str, tuple[str, Callable[..., Any]]] = {
  "lamb": ("optimizers.LAMB", Lamb),
  "triplet_semihard": ("losses.triplet_semihard_loss", triplet_semihard_loss),
  "triplet_hard": ("losses.triplet_hard_loss", triplet_hard_loss),
}
"""Where each is in tensorflow_addons, and what serves without it."""
