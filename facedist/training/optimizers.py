"""Optimizers by name, and how they update a group of variables."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import tensorflow as tf

from facedist import addons
from facedist.config import lookup
from facedist.models import network
from facedist.training import config as train_config
from facedist.training.config import OptimizerSettings

Optimizer: TypeAlias = (
  tf.keras.optimizers.Optimizer | tf.keras.optimizers.legacy.Optimizer
)
Hyperparameters: TypeAlias = Mapping[str, float]


def build(settings: OptimizerSettings, variables: Sequence[tf.Variable]) -> Optimizer:
  """Builds the optimizer of `--optimizer` over all variables that it will ever update.

  Keras raises an error for a variable that it first meets after the first step. The
  learning rate is 0 until `set_learning_rate`.

  Raises:
    errors.UsageError: There is no such optimizer, or a number is none of its own.
  """
  make = lookup(OPTIMIZERS, settings.optimizer, "optimizer")
  made = make(train_config.hyperparameters(settings), settings.nesterov, variables)
  if _is_legacy(made):
    made._create_all_weights(variables)  # what Keras' own `build` became later
  else:
    made.build(variables)
  return made


def set_learning_rate(optimizer: Optimizer, learning_rate: tf.Tensor) -> None:
  """Sets the learning rate, float32[]; called in cross-replica context."""
  optimizer.learning_rate.assign(learning_rate)


def apply(
  optimizer: Optimizer, gradients: Iterable[tuple[tf.Tensor, tf.Variable]]
) -> None:
  """Updates variables by gradients that are summed already; on every replica alike."""
  if _is_legacy(optimizer):
    optimizer.apply_gradients(gradients, experimental_aggregate_gradients=False)
  else:
    optimizer.apply_gradients(gradients, skip_gradients_aggregation=True)


def with_l2(
  gradients: Iterable[tf.Tensor],
  variables: Sequence[tf.Variable],
  *,
  optimizer: str,
  weight_decay: float,
) -> list[tf.Tensor]:
  """Adds weight decay to the gradients where it is coupled, as in SGD.

  Divided by the root of the mean square, as adamw and lamb do with a gradient, it would
  decay weights with large gradients less (arXiv:1711.05101); these two decay by
  themselves.
  """
  if optimizer != "sgd" or not weight_decay:
    return list(gradients)
  return [
    gradient + weight_decay * variable if network.is_decayed(variable) else gradient
    for gradient, variable in zip(gradients, variables, strict=True)
  ]


class _Momentum(tf.keras.optimizers.SGD):
  """Keras' SGD whose operations on a variable are one, which passes over it once."""

  def update_step(self, gradient: tf.Tensor, variable: tf.Variable) -> None:
    """Moves the average by the gradient, and the variable by the average."""
    average = self.momentums[self._index_dict[self._var_key(variable)]]
    tf.raw_ops.ResourceApplyKerasMomentum(
      var=variable.handle,
      accum=average.handle,
      lr=tf.cast(self.learning_rate, variable.dtype),
      grad=gradient,
      momentum=tf.cast(self.momentum, variable.dtype),
      use_nesterov=self.nesterov,
    )


def _sgd(
  hyperparameters: Hyperparameters, nesterov: bool, _: Sequence[tf.Variable]
) -> Optimizer:
  """SGD; momentum as in arXiv:1706.02677, eq. 10, with the learning rate in it."""
  return _Momentum(
    learning_rate=0.0,
    momentum=hyperparameters["momentum"],
    nesterov=nesterov,
    jit_compile=False,
  )


def _adamw(
  hyperparameters: Hyperparameters, _: bool, variables: Sequence[tf.Variable]
) -> Optimizer:
  """Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2)."""
  adamw = tf.keras.optimizers.AdamW(
    learning_rate=0.0,
    weight_decay=hyperparameters["weight_decay"],
    beta_1=hyperparameters["beta1"],
    beta_2=hyperparameters["beta2"],
    epsilon=hyperparameters["epsilon"],
    jit_compile=False,
  )
  adamw.exclude_from_weight_decay(var_list=_not_decayed(variables))
  return adamw


def _lamb(
  hyperparameters: Hyperparameters, _: bool, variables: Sequence[tf.Variable]
) -> Optimizer:
  """LAMB (arXiv:1904.00962, algorithm 2); what is not decayed has no trust ratio."""
  others = [_pattern(variable) for variable in _not_decayed(variables)]
  return addons.get("lamb")(
    learning_rate=0.0,
    weight_decay=hyperparameters["weight_decay"],
    beta_1=hyperparameters["beta1"],
    beta_2=hyperparameters["beta2"],
    epsilon=hyperparameters["epsilon"],
    exclude_from_weight_decay=others,
    exclude_from_layer_adaptation=others,
  )


OPTIMIZERS: dict[
  str, Callable[[Hyperparameters, bool, Sequence[tf.Variable]], Optimizer]
] = {
  "sgd": _sgd,
  "adamw": _adamw,
  "lamb": _lamb,
}


def _not_decayed(variables: Sequence[tf.Variable]) -> list[tf.Variable]:
  return [variable for variable in variables if not network.is_decayed(variable)]


def _pattern(variable: tf.Variable) -> str:
  """Returns what matches its name: `bias:0`, on the second replica bias/replica_1:0."""
  name, _, output = variable.name.partition(":")
  return rf"^{re.escape(name)}(/replica_\d+)?:{output}$"


def _is_legacy(optimizer: Optimizer) -> bool:
  """Says whether it is of Keras' old kind, as both LAMBs are."""
  return isinstance(optimizer, tf.keras.optimizers.legacy.Optimizer)
