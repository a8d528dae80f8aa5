"""Optimizers of rows: what a replica does to the class weights that it alone holds.

Each computes what Keras' optimizer of that name does to a variable, from the rows that
are given, and leaves the others as they are: a sampled step costs what its sample does.
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
  """How rows follow from their gradient.

  Attributes:
    slots: The columns beside the class weights.
    next_rows: From columns of float32[n, ...], their gradient, `rate` and `updates`,
      the number of this update from 1 on, the next.
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
  name: str, numbers: Mapping[str, float], *, nesterov: bool
) -> RowOptimizer:
  """Returns the optimizer of `--optimizer` for rows.

  Args:
    name: A key of `ROW_OPTIMIZERS`.
    numbers: Its numbers, by their flags.
    nesterov: Whether sgd's momentum is Nesterov's.

  Raises:
    errors.UsageError: The optimizer cannot update rows one by one.
  """
  check_row_optimizer(name)
  return ROW_OPTIMIZERS[name](numbers, nesterov)


def update(
  shard: RowRange,
  optimizer: RowOptimizer,
  gradient: Gradient,
  *,
  rate: tf.Tensor,
  updates: tf.Tensor,
) -> None:
  """Updates a shard; of IndexedSlices, the rows that these name and no others.

  Args:
    shard: Of this replica.
    optimizer: Whose slots the shard has.
    gradient: By the shard's class weights.
    rate: float32[], the learning rate.
    updates: int64[], the number of this update, from 1 on.
  """
  variables = shard.variables
  if isinstance(gradient, tf.IndexedSlices):
    rows = {name: tf.gather(each, gradient.indices) for name, each in variables.items()}
    values = gradient.values
  else:
    rows = {name: each.read_value() for name, each in variables.items()}
    values = gradient
  after = optimizer.next_rows(rows, values, rate=rate, updates=updates)
  for name, variable in variables.items():
    if isinstance(gradient, tf.IndexedSlices):
      variable.scatter_update(tf.IndexedSlices(after[name], gradient.indices))
    else:
      variable.assign(after[name])


def sgd(
  rows: Columns,
  gradient: tf.Tensor,
  *,
  rate: tf.Tensor,
  updates: tf.Tensor,
  momentum: float,
  nesterov: bool,
  weight_decay: float,
) -> Columns:
  """Moves rows by SGD with momentum: m ← μ m - η g, w ← w + m, as Keras computes it.

  With Nesterov's momentum w ← w + μ m - η g. Weight decay is added to the gradient.
  """
  decayed = gradient + weight_decay * rows[CLASS_WEIGHTS]
  velocity = momentum * rows["momentum"] - rate * decayed
  change = momentum * velocity - rate * decayed if nesterov else velocity
  return {CLASS_WEIGHTS: rows[CLASS_WEIGHTS] + change, "momentum": velocity}


def adamw(
  rows: Columns,
  gradient: tf.Tensor,
  *,
  rate: tf.Tensor,
  updates: tf.Tensor,
  beta1: float,
  beta2: float,
  epsilon: float,
  weight_decay: float,
) -> Columns:
  """Moves rows by Adam with decoupled decay (arXiv:1711.05101, alg. 2), as Keras does.

  The bias is corrected by the number of all updates, of which a sampled row has had
  but its share.
  """
  count = tf.cast(updates, tf.float32)
  correction = tf.sqrt(1 - beta2**count) / (1 - beta1**count)
  mean = rows["m"] + (1 - beta1) * (gradient - rows["m"])
  square = rows["v"] + (1 - beta2) * (tf.square(gradient) - rows["v"])
  kept = rows[CLASS_WEIGHTS] * (1 - weight_decay * rate)
  moved = kept - rate * correction * mean / (tf.sqrt(square) + epsilon)
  return {CLASS_WEIGHTS: moved, "m": mean, "v": square}


def _sgd(numbers: Mapping[str, float], nesterov: bool) -> RowOptimizer:
  next_rows = functools.partial(
    sgd,
    momentum=numbers["momentum"],
    nesterov=nesterov,
    weight_decay=numbers["weight_decay"],
  )
  return RowOptimizer(("momentum",), next_rows)


def _adamw(numbers: Mapping[str, float], _: bool) -> RowOptimizer:
  next_rows = functools.partial(
    adamw,
    beta1=numbers["beta1"],
    beta2=numbers["beta2"],
    epsilon=numbers["epsilon"],
    weight_decay=numbers["weight_decay"],
  )
  return RowOptimizer(("m", "v"), next_rows)


ROW_OPTIMIZERS: dict[str, Callable[[Mapping[str, float], bool], RowOptimizer]] = {
  "sgd": _sgd,
  "adamw": _adamw,
}
