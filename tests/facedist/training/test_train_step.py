"""The replica step, on one device and on two halves of the CPU."""

import dataclasses
import functools
import pathlib
import re
import tempfile
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from facedist.training import step_health, train_step, trainer
from facedist.training.config import resolve
from tests.facedist.training import steps
from tests.facedist.training.steps import (
  FULL,
  HEAD,
  IDENTITIES,
  batches,
  build,
  column,
  one,
  train,
)

CONFIG = dataclasses.replace(
  steps.SPECK, margin=0.2, momentum=0.0, weight_decay=0.0, clip_norm=0.0
)
SETTINGS = train_step.settings_of(resolve(CONFIG))


@pytest.fixture(scope="module")
def plain() -> steps.Trained:
  """One step of CONFIG on one device."""
  return train(one(), CONFIG, 1)


def test_two_replicas_take_the_same_steps_as_one(
  two_replicas: tf.distribute.MirroredStrategy,
):
  run = dataclasses.replace(CONFIG, dropout=0.4)
  alone, two = train(one(), run, 4), train(two_replicas, run, 4)
  np.testing.assert_allclose(alone.rows, two.rows, rtol=1e-4)
  assert column(two.rows, "damaged").tolist() == [2, 2, 2, 2]
  for left, right in zip(alone.after, two.after, strict=True):
    np.testing.assert_allclose(left, right, atol=1e-5)


def test_a_step_moves_each_weight_by_the_rate_times_the_mean_gradient(
  plain: steps.Trained,
):
  fresh, batch = build(one(), CONFIG), next(batches(one()))
  with tf.GradientTape() as tape:
    unit = tf.linalg.l2_normalize(fresh.network.embed(batch["image"], training=True), 1)
    class_weights = tf.linalg.l2_normalize(fresh.head.class_weights, 1)
    is_target = tf.one_hot(batch["label"], IDENTITIES)
    logits = 8.0 * (unit @ tf.transpose(class_weights) - 0.2 * is_target)
    loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(is_target, logits))
  variables = [*fresh.head_variables, *fresh.backbone_variables]
  gradients = tape.gradient(loss, variables)
  for before, gradient, after in zip(plain.before, gradients, plain.after, strict=True):
    np.testing.assert_allclose(after, before - 0.1 * gradient, atol=1e-5)


def test_the_frozen_phase_moves_the_head_group_only():
  run = dataclasses.replace(CONFIG, backbone="vgg8")
  before = [weight.numpy() for weight in build(one(), run).network.backbone.weights]
  trained = train(one(), run, 2, HEAD)
  for old, new in zip(before, trained.built.network.backbone.weights, strict=True):
    np.testing.assert_array_equal(old, new.numpy())  # batch statistics too
  split = len(trained.built.head_variables)
  for old, new in zip(trained.before[:split], trained.after[:split], strict=True):
    assert not np.allclose(old, new)


def test_weight_decay_shrinks_kernels_and_class_weights_only(plain: steps.Trained):
  decayed = train(one(), dataclasses.replace(CONFIG, weight_decay=0.5), 1)
  for before, without, with_decay in zip(
    plain.before, plain.after, decayed.after, strict=True
  ):
    expected = -0.1 * 0.5 * before if before.ndim > 1 else np.zeros_like(before)
    np.testing.assert_allclose(with_decay - without, expected, atol=2e-6)


def test_clipping_bounds_the_update_by_the_global_norm():
  trained = train(one(), dataclasses.replace(CONFIG, clip_norm=0.01), 1)
  assert column(trained.rows, "gradient_norm")[0] > 0.01  # reported before clipping
  changes = map(np.subtract, trained.after, trained.before)
  norm = np.sqrt(sum(np.sum(change**2) for change in changes))
  np.testing.assert_allclose(norm, 0.1 * 0.01, rtol=1e-3)


def test_each_group_has_its_own_rate(plain: steps.Trained):
  phase = dataclasses.replace(FULL, backbone_learning_rate=0.025)
  slow = train(one(), CONFIG, 1, phase)
  split = len(slow.built.head_variables)
  for index, (before, a, b) in enumerate(
    zip(slow.before, slow.after, plain.after, strict=True)
  ):
    share = 1.0 if index < split else 0.25
    np.testing.assert_allclose(a - before, share * (b - before), atol=1e-6)


@pytest.mark.parametrize(
  ("replicas", "changes"),
  [
    (1, {}),
    (2, {}),
    (1, {"accumulate_steps": 2}),
    (2, {"head_sharding": "sharded"}),
  ],
)
def test_a_float16_overflow_skips_the_step_and_halves_the_scale(
  replicas: int, changes: dict[str, Any], two_halves: tf.distribute.Strategy
):
  strategy = one() if replicas == 1 else two_halves
  run = dataclasses.replace(CONFIG, policy="mixed_float16", momentum=0.9, **changes)
  built = build(strategy, run)
  built.loss_scale.scale.assign(2.0**40)  # any float16 gradient overflows
  shards = built.rows.shards if built.rows else ()

  def values() -> list[np.ndarray]:
    rows = [column for shard in shards for column in shard.variables.values()]
    return [*steps.weights(built), *(column.numpy() for column in rows)]

  first = values()
  rows = steps.trainer(strategy, built, run)(1)  # which is no fault
  assert not np.isfinite(column(rows, "gradient_norm")[0])
  assert np.isfinite(column(rows, "loss")[0])
  for before, after in zip(first, values(), strict=True):
    np.testing.assert_array_equal(before, after)
  assert built.loss_scale.scale.numpy() == 2.0**39
  assert built.loss_scale.skipped.numpy() == 1
  assert built.step.numpy() == 1  # the schedule and the data go on


def test_float16_with_loss_scaling_follows_float32():
  run = dataclasses.replace(CONFIG, backbone="tinynet")  # bounded by its norms
  mixed = dataclasses.replace(run, policy="mixed_float16")
  gentle = functools.partial(batches, num_batches=4)  # nothing overflows
  states = [build(one(), each) for each in (run, mixed)]
  float32, float16 = (
    steps.trainer(one(), built, each, batches=gentle)(4)
    for built, each in zip(states, (run, mixed), strict=True)
  )
  for name, tolerance in (("loss", 0.02), ("gradient_norm", 0.05)):
    np.testing.assert_allclose(
      column(float16, name), column(float32, name), rtol=tolerance
    )
  assert states[1].loss_scale.scale.numpy() == 2.0**15


SYNC = dataclasses.replace(CONFIG, backbone="vgg8", sync_batch_norm=True, dropout=0.0)


def test_synchronised_batch_norm_on_two_replicas_is_the_fused_one_on_one(
  two_replicas: tf.distribute.MirroredStrategy,
):
  own = dataclasses.replace(SYNC, sync_batch_norm=False)
  whole, synced = train(one(), own, 1), train(two_replicas, SYNC, 1)
  np.testing.assert_allclose(whole.rows, synced.rows, rtol=1e-3)
  for left, right in zip(
    whole.built.network.variables, synced.built.network.variables, strict=True
  ):
    np.testing.assert_allclose(left.numpy(), right.numpy(), rtol=1e-3, atol=1e-4)
  halves = train(two_replicas, own, 1)  # each with statistics of its own
  losses = [column(trained.rows, "loss") for trained in (whole, halves)]
  assert not np.allclose(*losses, rtol=1e-3)


def test_a_step_leaves_frozen_layers_as_they_are():
  run = dataclasses.replace(SYNC, freeze_until="block2_conv1_bn")
  fresh, built = build(one(), run), train(one(), run, 1).built
  layers = fresh.network.backbone.layers
  last = [layer.name for layer in layers].index("block2_conv1_bn")
  for number, (before, after) in enumerate(
    zip(layers, built.network.backbone.layers, strict=True)
  ):
    for old, new in zip(before.get_weights(), after.get_weights(), strict=True):
      # a bias before batch norm has no gradient but rounding
      if number <= last or old.ndim > 1:
        assert np.array_equal(old, new) == (number <= last), before.name


def test_the_rate_column_is_the_schedule():
  rows = train(one(), CONFIG, 4, dataclasses.replace(FULL, warmup_steps=4)).rows
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
    built = train(strategy, CONFIG, 0).built
    loop = trainer.validation_loop(built, strategy, step_health.StepHealth())
    loop(batches(strategy), tf.constant(0))
  converted = "".join(path.read_text() for path in tmp_path.iterdir())
  names = set(re.findall(r"def tf__(\w+)", converted))
  assert names <= {"loop", "goes_on"}


def test_a_validation_pass_changes_no_weight(
  two_replicas: tf.distribute.MirroredStrategy,
):
  built = build(two_replicas, CONFIG)
  before = [weight.numpy() for weight in built.network.variables]
  loop = trainer.validation_loop(built, two_replicas, step_health.StepHealth())
  totals, is_whole = loop(batches(two_replicas), tf.constant(3))
  assert totals.numpy()[1] == 24.0
  assert totals.numpy()[-1] == 6.0  # every fourth record of 24 is marked as damaged
  assert is_whole
  for old, new in zip(before, built.network.variables, strict=True):
    np.testing.assert_array_equal(old, new.numpy())


def test_a_request_to_stop_ends_a_validation_pass(
  two_replicas: tf.distribute.MirroredStrategy,
):
  asked = step_health.StepHealth()
  asked.request_stop()
  built = build(two_replicas, CONFIG)
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
  def corrupt(place: tf.Tensor, part: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    nan = tf.fill(part["draws"].shape, float("nan"))
    return part | {"draws": tf.where(place % 2 == 1, nan, part["draws"])}

  content = steps.distribute(two_replicas, steps.dataset(2).enumerate().map(corrupt))
  settings = dataclasses.replace(SETTINGS, augment_color=0.5)
  built = build(two_replicas, CONFIG)
  loop = train_step.train_loop(
    built, FULL, settings, two_replicas, step_health.StepHealth()
  )
  rows, flags = loop(content, tf.constant(4))
  found = step_health.find_problem(
    flags.numpy(), np.isfinite(column(rows.numpy(), "loss"))
  )
  assert found == step_health.HealthProblem(stop=False, bad_step=0, bad_replicas=(1,))


def test_a_step_waits_for_the_clock_that_says_how_long_its_batch_took():
  """A lone thread would otherwise look at the clock after the whole step."""
  with tf.Graph().as_default() as graph:
    arriving = {name: tf.random.uniform([3]) for name in ("image", "label")}
    batch, _ = train_step.timed_next(
      iter([arriving]), tf.distribute.get_strategy(), deterministic=False
    )

  def before(operation: tf.Operation) -> set[str]:
    earlier = tf.compat.v1.graph_util.extract_sub_graph(
      graph.as_graph_def(), [operation.name]
    )
    return {node.name for node in earlier.node}

  clocks = [op for op in graph.get_operations() if op.type == "Timestamp"]
  assert len(clocks) == 2
  (ended,) = [op for op in clocks if arriving["label"].op.name in before(op)]
  for part in batch.values():
    assert ended.name in before(part.op)
