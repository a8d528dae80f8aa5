"""The replica step, on one device and on two halves of the CPU."""

import dataclasses
import functools
import pathlib
import re
import tempfile

import numpy as np
import pytest
import tensorflow as tf

from facedist.training import config as train_config
from facedist.training import (
  schedules,
  step_health,
  train_state,
  train_step,
  trainer,
)
from tests.facedist.training import steps
from tests.facedist.training.steps import (
  FULL,
  HEAD,
  IDENTITIES,
  build,
  column,
  one,
)

CONFIG = dataclasses.replace(steps.SPECK, margin=0.2, momentum=0.0, weight_decay=0.0)
SETTINGS = train_step.StepSettings(
  global_batch=8,
  weight_decay=0.0,
  clip_norm=0.0,
  augment_flip=False,
  augment_crop=0.0,
  augment_color=0.0,
  deterministic=False,
)


batches = functools.partial(steps.batches, num_batches=4)


def train(
  strategy: tf.distribute.Strategy,
  phase: schedules.Phase = FULL,
  num_steps: int = 4,
  settings: train_step.StepSettings = SETTINGS,
  run: train_config.TrainConfig = CONFIG,
) -> tuple[np.ndarray, train_state.TrainState, list[np.ndarray]]:
  """Trains from scratch; returns the rows, the state and the first weights."""
  built = build(strategy, run)
  first = [variable.numpy() for variable in variables(built)]
  loop = train_step.train_loop(
    built, phase, settings, strategy, step_health.StepHealth()
  )
  rows, _ = loop(batches(strategy), tf.constant(num_steps))
  return rows.numpy(), built, first


def variables(built: train_state.TrainState) -> list[tf.Variable]:
  return [*built.head_variables, *built.backbone_variables]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_two_replicas_take_the_same_steps_as_one(
  two_replicas: tf.distribute.MirroredStrategy, dropout: float
):
  run = dataclasses.replace(CONFIG, dropout=dropout)
  rows_of_one, alone, _ = train(one(), run=run)
  rows_of_two, two, _ = train(two_replicas, run=run)
  np.testing.assert_allclose(rows_of_one[:, :-1], rows_of_two[:, :-1], rtol=1e-4)
  assert column(rows_of_two, "damaged").tolist() == [2, 2, 2, 2]
  for left, right in zip(variables(alone), variables(two), strict=True):
    np.testing.assert_allclose(left.numpy(), right.numpy(), atol=1e-5)


def test_a_step_moves_each_weight_by_the_rate_times_the_mean_gradient():
  _, trained, first = train(one(), num_steps=1)
  fresh = build(one(), CONFIG)
  batch = next(batches(one()))
  with tf.GradientTape() as tape:
    embeddings = fresh.network.embed(batch["image"], training=True)
    unit = embeddings / tf.norm(embeddings, axis=1, keepdims=True)
    weights = fresh.head.class_weights / tf.norm(
      fresh.head.class_weights, axis=1, keepdims=True
    )
    logits = 8.0 * (unit @ tf.transpose(weights))
    logits -= 8.0 * 0.2 * tf.one_hot(batch["label"], IDENTITIES)
    loss = tf.reduce_mean(
      tf.keras.losses.sparse_categorical_crossentropy(
        batch["label"], logits, from_logits=True
      )
    )
  gradients = tape.gradient(loss, variables(fresh))
  for before, gradient, after in zip(first, gradients, variables(trained), strict=True):
    np.testing.assert_allclose(after.numpy(), before - 0.1 * gradient, atol=1e-5)


def test_the_frozen_phase_moves_the_head_group_only():
  run = dataclasses.replace(CONFIG, backbone="resnet50")
  _, built, _ = train(one(), HEAD, num_steps=0, run=run)
  before = [weight.numpy() for weight in built.network.backbone.weights]
  weights = built.head.class_weights.numpy()
  loop = train_step.train_loop(built, HEAD, SETTINGS, one(), step_health.StepHealth())
  loop(batches(one()), tf.constant(2))
  for old, new in zip(before, built.network.backbone.weights, strict=True):
    np.testing.assert_array_equal(old, new.numpy())  # batch statistics too
  assert not np.allclose(weights, built.head.class_weights.numpy())


def test_weight_decay_shrinks_kernels_and_class_weights_only():
  plain = train(one(), num_steps=1)
  settings = dataclasses.replace(SETTINGS, weight_decay=0.5)
  decayed = train(one(), num_steps=1, settings=settings)
  for before, without, with_decay in zip(
    plain[2], variables(plain[1]), variables(decayed[1]), strict=True
  ):
    is_kernel = before.ndim > 1
    expected = -0.1 * 0.5 * before if is_kernel else np.zeros_like(before)
    difference = with_decay.numpy() - without.numpy()
    np.testing.assert_allclose(difference, expected, atol=2e-6)


def test_clipping_bounds_the_update_by_the_global_norm():
  rows, built, first = train(
    one(), num_steps=1, settings=dataclasses.replace(SETTINGS, clip_norm=0.01)
  )
  assert column(rows, "gradient_norm")[0] > 0.01  # reported before clipping
  moved = [
    after.numpy() - before
    for before, after in zip(first, variables(built), strict=True)
  ]
  norm = np.sqrt(sum(np.sum(change**2) for change in moved))
  np.testing.assert_allclose(norm, 0.1 * 0.01, rtol=1e-3)


def test_each_group_has_its_own_rate():
  phase = dataclasses.replace(FULL, backbone_learning_rate=0.025)
  slow, fast = train(one(), phase, num_steps=1), train(one(), num_steps=1)
  split = len(slow[1].head_variables)
  for index, (before, a, b) in enumerate(
    zip(slow[2], variables(slow[1]), variables(fast[1]), strict=True)
  ):
    share = 1.0 if index < split else 0.25
    np.testing.assert_allclose(
      a.numpy() - before, share * (b.numpy() - before), atol=1e-6
    )


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_float16_overflow_skips_the_step_and_halves_the_scale(
  replicas: int, two_replicas: tf.distribute.MirroredStrategy
):
  strategy = one() if replicas == 1 else two_replicas
  run = dataclasses.replace(CONFIG, policy="mixed_float16")
  built = build(strategy, run)
  built.loss_scale.scale.assign(2.0**40)  # any float16 gradient overflows
  first = [variable.numpy() for variable in variables(built)]
  loop = train_step.train_loop(
    built, FULL, SETTINGS, strategy, step_health.StepHealth()
  )
  rows, flags = (part.numpy() for part in loop(batches(strategy), tf.constant(1)))
  assert not flags.any()  # a step that scaling skips is no fault
  assert not np.isfinite(column(rows, "gradient_norm")[0])
  assert np.isfinite(column(rows, "loss")[0])
  for before, after in zip(first, variables(built), strict=True):
    np.testing.assert_array_equal(before, after.numpy())
  assert built.loss_scale.scale.numpy() == 2.0**39
  assert built.loss_scale.skipped.numpy() == 1
  assert built.step.numpy() == 1  # the schedule and the data go on


def test_float16_with_loss_scaling_follows_float32():
  base = dataclasses.replace(CONFIG, backbone="tinynet")  # bounded by its norms
  float32, _, _ = train(one(), run=base)
  run = dataclasses.replace(base, policy="mixed_float16")
  float16, built, _ = train(one(), run=run)
  np.testing.assert_allclose(
    column(float16, "loss"), column(float32, "loss"), rtol=0.02
  )
  np.testing.assert_allclose(
    column(float16, "gradient_norm"), column(float32, "gradient_norm"), rtol=0.05
  )
  assert built.loss_scale.scale.numpy() == 2.0**15


def test_the_rate_column_is_the_schedule():
  phase = dataclasses.replace(FULL, warmup_steps=4)
  rows, _, _ = train(one(), phase)
  np.testing.assert_allclose(
    column(rows, "learning_rate"), [0.025, 0.05, 0.075, 0.1], rtol=1e-6
  )


def test_autograph_converts_the_loop_and_nothing_below_it(
  two_replicas: tf.distribute.MirroredStrategy,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # AutoGraph's code goes there
  for strategy in (one(), two_replicas):
    _, built, _ = train(strategy, num_steps=0)
    loop = trainer.validation_loop(built, strategy, step_health.StepHealth())
    loop(batches(strategy), tf.constant(0))
  converted = "".join(path.read_text() for path in tmp_path.iterdir())
  names = set(re.findall(r"def tf__(\w+)", converted))
  assert names <= {"loop", "goes_on"}


def test_a_validation_pass_changes_no_weight(
  two_replicas: tf.distribute.MirroredStrategy,
):
  _, built, _ = train(two_replicas, num_steps=0)
  before = [weight.numpy() for weight in built.network.backbone.weights]
  loop = trainer.validation_loop(built, two_replicas, step_health.StepHealth())
  totals, is_whole = loop(batches(two_replicas), tf.constant(3))
  assert totals.numpy()[1] == 24.0
  assert totals.numpy()[-1] == 6.0  # every fourth record of 24 is marked as damaged
  assert is_whole
  for old, new in zip(before, built.network.backbone.weights, strict=True):
    np.testing.assert_array_equal(old, new.numpy())


def test_a_request_to_stop_ends_a_validation_pass(
  two_replicas: tf.distribute.MirroredStrategy,
):
  _, built, _ = train(two_replicas, num_steps=0)
  asked = step_health.StepHealth()
  asked.request_stop()
  loop = trainer.validation_loop(built, two_replicas, asked)
  totals, is_whole = loop(batches(two_replicas), tf.constant(3))
  assert totals.numpy()[1] == 8.0
  assert not is_whole


def test_a_request_to_stop_ends_the_loop_within_two_steps(
  two_replicas: tf.distribute.MirroredStrategy,
):
  built = build(two_replicas, CONFIG)
  asked = step_health.StepHealth()
  asked.request_stop()
  loop = train_step.train_loop(built, FULL, SETTINGS, two_replicas, asked)
  rows, flags = loop(batches(two_replicas), tf.constant(10))
  assert len(rows) == len(flags) == built.step.numpy() == 2
  assert step_health.find_problem(
    flags.numpy(), np.array([True, True])
  ) == step_health.HealthProblem(stop=True, bad_step=None, bad_replicas=())
  assert asked.count_arrivals() == 2 * 2  # two steps of two replicas


def test_what_is_not_finite_names_its_replica(
  two_replicas: tf.distribute.MirroredStrategy,
):
  built = build(two_replicas, CONFIG)
  content = next(batches(two_replicas))
  draws = two_replicas.experimental_local_results(content["draws"])

  def batch(context: tf.distribute.experimental.ValueContext) -> dict[str, tf.Tensor]:
    place = context.replica_id_in_sync_group
    own = {
      name: two_replicas.experimental_local_results(value)[place]
      for name, value in content.items()
    }
    if place == 1:
      own["draws"] = tf.fill(draws[1].shape, float("nan"))
    return own

  values = two_replicas.experimental_distribute_values_from_function(batch)
  settings = dataclasses.replace(SETTINGS, augment_color=0.5)
  loop = train_step.train_loop(
    built, FULL, settings, two_replicas, step_health.StepHealth()
  )
  rows, flags = loop(iter([values] * 4), tf.constant(4))
  found = step_health.find_problem(
    flags.numpy(), np.isfinite(column(rows.numpy(), "loss"))
  )
  assert found == step_health.HealthProblem(stop=False, bad_step=0, bad_replicas=(1,))
