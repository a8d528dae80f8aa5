"""Optimizers for the rows of a sharded head, which only one replica holds.

Each computes what Keras' optimizer of that name does to a variable, for the rows that
are given, and leaves the others alone. So a sampled step costs what its sample costs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TypeAlias

import tensorflow as tf

from facedist import errors
from facedist.distributed.collectives import Gradient
from facedist.models.heads.class_weights import CLASS_WEIGHTS, RowRange

Columns: TypeAlias = Mapping[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class RowOptimizer:
  """An optimizer's slots and its update.

  Attributes:
    slots: The columns beside the class weights.
    next_rows: Returns the next columns of float32[n, ...] from the columns, their
      gradient, `learning_rate` and `updates`, the number of this update from 1 on.
  """

  slots: tuple[str, ...]
  next_rows: Callable[..., Columns]


def check_row_optimizer(name: str) -> None:
  """Raises UsageError if the optimizer of this name cannot update rows one by one."""
  if name not in ROW_OPTIMIZERS:
    raise errors.UsageError(
      f"--optimizer={name} does not update class weights row by row; give "
      f"--optimizer={' or '.join(ROW_OPTIMIZERS)}, or --head_sharding=replicated."
    )


def make_row_optimizer(
  name: str, hyperparameters: Mapping[str, float], *, nesterov: bool
) -> RowOptimizer:
  """Returns the optimizer of `--optimizer` for rows.

  Args:
    name: A key of `ROW_OPTIMIZERS`.
    hyperparameters: By the names of their flags.
    nesterov: Whether sgd's momentum is Nesterov's.

  Raises:
    errors.UsageError: The optimizer cannot update rows one by one.
  """
  check_row_optimizer(name)
  return ROW_OPTIMIZERS[name](hyperparameters, nesterov)


def update(
  shard: RowRange,
  optimizer: RowOptimizer,
  gradient: Gradient,
  *,
  learning_rate: tf.Tensor,
  updates: tf.Tensor,
) -> None:
  """Updates a shard; if the gradient is IndexedSlices, only the rows that it names.

  Args:
    shard: The rows of this replica.
    optimizer: The optimizer; the shard has its slots.
    gradient: By the shard's class weights.
    learning_rate: float32[], the learning learning_rate.
    updates: int64[], the number of this update, from 1 on.
  """
  variables = shard.variables
  if isinstance(gradient, tf.IndexedSlices):
    rows = {name: tf.gather(each, gradient.indices) for name, each in variables.items()}
    values = gradient.values
  else:
    rows = {name: each.read_value() for name, each in variables.items()}
    values = gradient
  after = optimizer.next_rows(
    rows, values, learning_rate=learning_rate, updates=updates
  )
  for name, variable in variables.items():
    if isinstance(gradient, tf.IndexedSlices):
      variable.scatter_update(tf.IndexedSlices(after[name], gradient.indices))
    else:
      variable.assign(after[name])


def sgd(
  rows: Columns,
  gradient: tf.Tensor,
  *,
  learning_rate: tf.Tensor,
  updates: tf.Tensor,
  momentum: float,
  nesterov: bool,
  weight_decay: float,
) -> Columns:
  """Moves rows by SGD with momentum: m ← μ m - η g, w ← w + m, as Keras computes it.

  With Nesterov's momentum w ← w + μ m - η g. Weight decay is added to the gradient.
  """
  decayed = gradient + weight_decay * rows[CLASS_WEIGHTS]
  velocity = momentum * rows["momentum"] - learning_rate * decayed
  change = momentum * velocity - learning_rate * decayed if nesterov else velocity
  return {CLASS_WEIGHTS: rows[CLASS_WEIGHTS] + change, "momentum": velocity}


def adamw(
  rows: Columns,
  gradient: tf.Tensor,
  *,
  learning_rate: tf.Tensor,
  updates: tf.Tensor,
  beta1: float,
  beta2: float,
  epsilon: float,
  weight_decay: float,
) -> Columns:
  """Moves rows by Adam with decoupled decay (arXiv:1711.05101, alg. 2), as Keras does.

  The bias is corrected by the number of all updates, though a sampled row has taken
  part in only some of them.
  """
  count = tf.cast(updates, tf.float32)
  correction = tf.sqrt(1 - beta2**count) / (1 - beta1**count)
  mean = rows["m"] + (1 - beta1) * (gradient - rows["m"])
  square = rows["v"] + (1 - beta2) * (tf.square(gradient) - rows["v"])
  kept = rows[CLASS_WEIGHTS] * (1 - weight_decay * learning_rate)
  moved = kept - learning_rate * correction * mean / (tf.sqrt(square) + epsilon)
  return {CLASS_WEIGHTS: moved, "m": mean, "v": square}


def _sgd(hyperparameters: Mapping[str, float], nesterov: bool) -> RowOptimizer:
  next_rows = functools.partial(
    sgd,
    momentum=hyperparameters["momentum"],
    nesterov=nesterov,
    weight_decay=hyperparameters["weight_decay"],
  )
  return RowOptimizer(("momentum",), next_rows)


def _adamw(hyperparameters: Mapping[str, float], _: bool) -> RowOptimizer:
  next_rows = functools.partial(
    adamw,
    beta1=hyperparameters["beta1"],
    beta2=hyperparameters["beta2"],
    epsilon=hyperparameters["epsilon"],
    weight_decay=hyperparameters["weight_decay"],
  )
  return RowOptimizer(("m", "v"), next_rows)


ROW_OPTIMIZERS: dict[str, Callable[[Mapping[str, float], bool], RowOptimizer]] = {
  "sgd": _sgd,
  "adamw": _adamw,
}
