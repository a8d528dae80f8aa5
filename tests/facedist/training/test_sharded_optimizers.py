import numpy as np
import pytest
import tensorflow as tf

from facedist.models.heads import class_weights
from facedist.training import sharded_optimizers

RATES = (0.1, 0.05, 0.2)


def table(optimizer: sharded_optimizers.RowOptimizer) -> class_weights.RowTable:
  made = class_weights.RowTable(
    num_rows=6, row_shape=(4,), slots=optimizer.slots, places={0: "CPU:0"}
  )
  made.draw_class_weights(2)
  return made


def gradients() -> np.ndarray:
  return np.random.default_rng(5).normal(size=(3, 6, 4)).astype(np.float32)


ADAMW = {"beta1": 0.8, "beta2": 0.99, "epsilon": 1e-6, "weight_decay": 0.1}


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize(
  ("name", "numbers", "nesterov"),
  [
    *(
      ("sgd", {"momentum": momentum, "weight_decay": 0.01}, nesterov)
      for momentum in (0.0, 0.9)
      for nesterov in (False, True)
    ),
    ("adamw", ADAMW, False),
  ],
)
def test_rows_move_as_a_variable_under_keras(
  name: str, numbers: dict[str, float], nesterov: bool, is_sparse: bool
):
  optimizer = sharded_optimizers.make_row_optimizer(name, numbers, nesterov=nesterov)
  (shard,) = table(optimizer).shards
  variable = tf.Variable(shard.variables["centres"].numpy())
  if name == "sgd":
    keras = tf.keras.optimizers.SGD(momentum=numbers["momentum"], nesterov=nesterov)
  else:
    keras = tf.keras.optimizers.AdamW(
      beta_1=0.8, beta_2=0.99, epsilon=1e-6, weight_decay=0.1
    )
  decay = 0.01 if name == "sgd" else 0.0  # Keras' AdamW decays by itself
  for number, (rate, gradient) in enumerate(zip(RATES, gradients(), strict=True), 1):
    keras.learning_rate.assign(rate)
    keras.apply_gradients([(gradient + decay * variable, variable)])
    given = tf.IndexedSlices(gradient, tf.range(6)) if is_sparse else gradient
    sharded_optimizers.update(
      shard,
      optimizer,
      given,
      learning_rate=tf.constant(rate),
      updates=tf.constant(number, tf.int64),
    )
    close = {"rtol": 1e-6, "atol": 1e-9} if name == "sgd" else {"rtol": 1e-5}
    np.testing.assert_allclose(
      shard.variables["centres"].numpy(), variable.numpy(), **({"atol": 1e-7} | close)
    )
  if name == "sgd":
    np.testing.assert_allclose(
      shard.variables["momentum"].numpy(), keras.momentums[0].numpy(), **close
    )


def test_only_the_rows_that_are_named_move_and_their_slots():
  optimizer = sharded_optimizers.make_row_optimizer(
    "sgd", {"momentum": 0.9, "weight_decay": 0.01}, nesterov=False
  )
  (shard,) = table(optimizer).shards
  for number in (1, 2):  # so that the slots of the named rows are not zero
    before = {name: value.numpy() for name, value in shard.variables.items()}
    sharded_optimizers.update(
      shard,
      optimizer,
      tf.IndexedSlices(tf.ones([2, 4]), tf.constant([1, 4])),
      learning_rate=tf.constant(0.1),
      updates=tf.constant(number, tf.int64),
    )
    for name, value in shard.variables.items():
      changed = (value.numpy() != before[name]).all(axis=1)
      assert changed.tolist() == [False, True, False, False, True, False]
