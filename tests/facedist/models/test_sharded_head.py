"""The sharded head against the replicated one."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from facedist.data import hashing
from facedist.distributed import strategies
from facedist.distributed.cluster import Cluster as Cluster
from facedist.distributed.detect import free_addresses
from facedist.models.gather import this_replica
from facedist.models.heads import class_weights, replicated
from facedist.models.heads.base import HeadInput
from facedist.models.heads.margins import MARGINS, Margin
from facedist.models.heads.sharded import ShardedHead
from facedist.training import sharded_optimizers
from tests.facedist.two_workers import LIMIT

IDENTITIES = 7  # four on the first replica, three on the second
BATCH = 8
EMBEDDING = 6
STATISTICS = {"curricularface": [0.3], "adaface": [2.0, 0.7]}
STEP = 5


@dataclasses.dataclass(frozen=True)
class Result:
  """A head's output of the global batch, and gradients of the mean of its losses."""

  output: dict[str, np.ndarray]
  by_embeddings: np.ndarray
  by_weights: np.ndarray


@pytest.fixture(scope="module")
def two() -> tf.distribute.Strategy:
  return strategies.make_strategy("mirrored", Cluster())


def margin_of(kind: str) -> Margin:
  """The head's defaults, for MagFace with a range around the norms of `batch`."""
  if kind == "magface":
    return MARGINS[kind].from_flags(
      {**MARGINS[kind].defaults(), "norm_low": 1.0, "norm_high": 4.0}
    )
  return MARGINS[kind]()


def batch(
  identities: int = IDENTITIES, size: int = BATCH
) -> tuple[tf.Tensor, tf.Tensor]:
  """Embeddings of norms about 2.4 and labels of all identities."""
  embeddings = np.random.default_rng(1).normal(size=(size, EMBEDDING))
  labels = np.arange(size) * 3 % identities
  return tf.constant(embeddings, tf.float32), tf.constant(labels, tf.int32)


def replicated_outcome(kind: str, embeddings: tf.Tensor, labels: tf.Tensor) -> Result:
  """The replicated head's result, without a strategy."""
  head = replicated.MarginHead(
    num_identities=IDENTITIES,
    embedding_size=EMBEDDING,
    seed=3,
    margin=margin_of(kind),
    sub_centres=MARGINS[kind].default_sub_centres,
  )
  if head.running_statistics is not None:
    head.running_statistics.assign(STATISTICS[kind])
  with tf.GradientTape() as tape:
    tape.watch(embeddings)
    output = head.forward(HeadInput(embeddings, labels, tf.constant(STEP, tf.int64)))
    loss = tf.reduce_sum(output.losses) / BATCH
  by_embeddings, by_weights = tape.gradient(loss, [embeddings, head.class_weights])
  parts = {key: value.numpy() for key, value in vars(output).items()}
  return Result(parts, by_embeddings.numpy(), by_weights.numpy())


def sharded(
  strategy: tf.distribute.Strategy,
  kind: str,
  embeddings: tf.Tensor,
  labels: tf.Tensor,
  *,
  sample_rate: float | None = None,
  is_training: bool = True,
  is_traced: bool = True,
  weights: np.ndarray | None = None,
  scale: float = 64.0,
) -> Result:
  """Every replica has its slice of the batch and its block of the class weights.

  With several processes, the result is this process's part. Tracing takes ten times as
  long as the rest, so tests of many cases run without it.
  """
  replicas = strategy.num_replicas_in_sync
  table = class_weights.RowTable(
    num_rows=IDENTITIES,
    row_shape=class_weights.row_shape(EMBEDDING, MARGINS[kind].default_sub_centres),
    num_replicas=replicas,
    places=strategies.places(strategy),
  )
  table.draw_class_weights(3)
  if weights is not None:
    for shard in table.shards:
      values = tf.constant(weights[shard.first : shard.stop], tf.float32)
      class_weights.write_rows(shard, "centres", shard.first, values)
  with strategy.scope():
    head = ShardedHead(
      table, margin=margin_of(kind), scale=scale, seed=3, sample_rate=sample_rate
    )
    if head.running_statistics is not None:
      head.running_statistics.assign(STATISTICS[kind])

  def replica() -> tuple:
    place, each = this_replica(), len(labels) // replicas
    own = embeddings[place * each : (place + 1) * each]
    step = tf.constant(STEP, tf.int64) if is_training else None
    with tf.GradientTape() as tape:
      tape.watch([own, *head.own_class_weights()])
      output = head.forward(
        HeadInput(own, labels[place * each : (place + 1) * each], step)
      )
      loss = tf.reduce_sum(output.losses) / BATCH
    by_own, by_rows = tape.gradient(loss, [own, *head.own_class_weights()])
    return vars(output), by_own, tf.convert_to_tensor(by_rows)

  def forward() -> tuple:
    return strategy.run(replica)

  function = tf.function(forward) if is_traced else forward
  outputs, by_own, by_rows = tf.nest.map_structure(
    lambda value: [part.numpy() for part in strategy.experimental_local_results(value)],
    function(),
  )
  statistics = outputs.pop("running_statistics")
  assert all(np.array_equal(one, statistics[0]) for one in statistics)
  output = {key: np.concatenate(parts) for key, parts in outputs.items()}
  blocks = zip(by_rows, table.shards, strict=True)
  return Result(
    output | {"running_statistics": statistics[0]},
    np.concatenate(by_own),
    np.concatenate([rows[: shard.count] for rows, shard in blocks]),
  )


def assert_same(found: Result, expected: Result) -> None:
  for name, value in expected.output.items():
    np.testing.assert_allclose(
      found.output[name].astype(float),
      value.astype(float),
      rtol=1e-5,
      atol=1e-5,
      err_msg=name,
    )
  for name in ("by_embeddings", "by_weights"):
    value = getattr(expected, name)
    largest = np.abs(value).max()
    assert largest > 0
    np.testing.assert_allclose(
      getattr(found, name), value, rtol=1e-4, atol=1e-5 * largest, err_msg=name
    )


@pytest.mark.parametrize("kind", MARGINS)
def test_losses_and_gradients_are_the_replicated_heads(
  kind: str, two: tf.distribute.Strategy
):
  embeddings, labels = batch()
  assert_same(
    sharded(two, kind, embeddings, labels), replicated_outcome(kind, embeddings, labels)
  )


@pytest.mark.slow
def test_two_processes_find_the_replicated_heads_losses_and_gradients(
  tmp_path: pathlib.Path,
):
  addresses, processes = free_addresses(2), []
  try:
    for index in range(2):
      task = {"type": "worker", "index": index}
      more = {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task})}
      module = "tests.facedist.models.heads_worker"
      processes.append(
        subprocess.Popen(
          [sys.executable, "-m", module, str(tmp_path / f"{index}.npz")],
          cwd=pathlib.Path(__file__).parents[3],
          env=os.environ | more,
        )
      )
    assert [process.wait(LIMIT) for process in processes] == [0, 0]
  finally:
    for process in processes:
      process.kill()
      process.wait()
  first, second = (dict(np.load(tmp_path / f"{index}.npz")) for index in range(2))
  for kind in MARGINS:
    expected = replicated_outcome(kind, *batch())
    statistics = first[f"{kind}/running_statistics"]
    np.testing.assert_array_equal(statistics, second[f"{kind}/running_statistics"])
    parts = {
      name: np.concatenate([first[f"{kind}/{name}"], second[f"{kind}/{name}"]])
      for name in (*expected.output, "by_embeddings", "by_weights")
    }
    by_embeddings, by_weights = parts.pop("by_embeddings"), parts.pop("by_weights")
    found = Result(
      parts | {"running_statistics": statistics}, by_embeddings, by_weights
    )
    assert_same(found, expected)


@pytest.mark.parametrize("sample_rate", [None, 0.5])
@pytest.mark.parametrize("kind", MARGINS)
def test_no_sharded_head_ever_gives_a_nan(
  kind: str, sample_rate: float | None, two: tf.distribute.Strategy
):
  axes = np.eye(EMBEDDING)
  weights = np.zeros((IDENTITIES, EMBEDDING))  # all zero but for two
  weights[0], weights[5] = axes[0], axes[1]
  if MARGINS[kind].default_sub_centres > 1:
    weights = np.repeat(weights[:, None], MARGINS[kind].default_sub_centres, axis=1)
  # cosines of 1, -1 and 0 with an own class weight, zero, tiny, mixed and huge vectors
  rows = [axes[0], -axes[0], axes[1], -axes[1], 0 * axes[0], np.ones(EMBEDDING)]
  rows += [length * axes[0] for length in (6e-8, 1e-7, 6e4, 1e20, -1e30)]
  embeddings = tf.constant(np.concatenate([rows] * 4), tf.float32)
  labels = tf.constant(np.repeat([0, 2, 5, 6], len(rows)), tf.int32)
  found = sharded(
    two,
    kind,
    embeddings,
    labels,
    sample_rate=sample_rate,
    is_traced=False,
    weights=weights,
  )
  for name, value in found.output.items():
    assert np.isfinite(value).all(), name
  assert np.isfinite(found.by_embeddings).all()
  assert np.isfinite(found.by_weights).all()


@pytest.mark.parametrize("kind", ["cosface", "subcentre_arcface"])
def test_a_sample_of_all_identities_is_the_whole_head(
  kind: str, two: tf.distribute.Strategy
):
  embeddings, labels = batch()
  found = sharded(two, kind, embeddings, labels, sample_rate=1.0)
  assert_same(found, replicated_outcome(kind, embeddings, labels))


def sampled_identities(labels: tf.Tensor, rate: float) -> np.ndarray:
  """Partial FC's choice: those of the batch, and those that the hash draws."""
  hashes = hashing.combine(3, np.array(STEP), np.arange(IDENTITIES))
  drawn = (hashes >> np.uint64(32)).astype(np.float64) / 2**32 < rate
  drawn[np.unique(labels)] = True
  return drawn


def test_a_sampled_loss_is_the_softmax_over_the_sample(two: tf.distribute.Strategy):
  embeddings, _ = batch()
  labels = tf.constant([5, 5, 0, 5, 0, 0, 5, 5])
  chosen = sampled_identities(labels, 0.4)
  assert {0, 5} < set(np.flatnonzero(chosen)) < set(range(IDENTITIES))
  found = sharded(two, "cosface", embeddings, labels, sample_rate=0.4, scale=8.0)
  weights = class_weights.initial_rows(3, 0, IDENTITIES, row_shape=(EMBEDDING,)).numpy()
  unit = embeddings.numpy() / np.linalg.norm(embeddings, axis=1, keepdims=True)
  cosines = unit @ (weights / np.linalg.norm(weights, axis=1, keepdims=True)).T
  logits = 8.0 * cosines
  logits[np.arange(BATCH), labels] -= 8.0 * 0.35
  exponents = np.exp(logits[:, chosen]).sum(axis=1)
  expected = np.log(exponents) - logits[np.arange(BATCH), labels]
  np.testing.assert_allclose(found.output["losses"], expected, rtol=1e-5)
  nearest = np.where(chosen, cosines, -2).argmax(axis=1)
  np.testing.assert_array_equal(found.output["is_correct"], nearest == labels)
  assert not found.by_weights[~chosen].any()
  assert np.abs(found.by_weights[chosen]).max(axis=1).all()


def test_one_replica_and_two_draw_the_same_sample(two: tf.distribute.Strategy):
  embeddings, labels = batch(identities=2)
  one = strategies.make_strategy("one", Cluster())
  alone = sharded(one, "arcface", embeddings, labels, sample_rate=0.3)
  together = sharded(two, "arcface", embeddings, labels, sample_rate=0.3)
  assert_same(together, alone)
  moved = np.abs(alone.by_weights).max(axis=1) > 0
  np.testing.assert_array_equal(moved, sampled_identities(labels, 0.3))


def test_comparing_with_all_class_weights_after_a_sampled_step_does_not_copy_them():
  one = strategies.make_strategy("one", Cluster())
  optimizer = sharded_optimizers.make_row_optimizer(
    "sgd", {"momentum": 0.9, "weight_decay": 0.0}, nesterov=False
  )
  table = class_weights.RowTable(
    num_rows=IDENTITIES,
    row_shape=(EMBEDDING,),
    slots=optimizer.slots,
    places=strategies.places(one),
  )
  table.draw_class_weights(3)
  head = ShardedHead(table, margin=margin_of("cosface"), sample_rate=0.1)
  embeddings, labels = batch(identities=2)

  def train() -> None:
    with tf.GradientTape() as tape:
      tape.watch(head.own_class_weights())
      step = tf.constant(STEP, tf.int64)
      loss = tf.reduce_sum(head.forward(HeadInput(embeddings, labels, step)).losses)
    sharded_optimizers.update(
      table.own_shard(),
      optimizer,
      tape.gradient(loss, head.own_class_weights()[0]),
      learning_rate=tf.constant(0.1),
      updates=tf.constant(1, tf.int64),
    )

  variable = table.shards[0].variables["centres"]
  before = variable.numpy()
  tf.function(lambda: one.run(train))()
  moved = (variable.numpy() != before).any(axis=1)
  assert {0, 1} <= set(np.flatnonzero(moved)) < set(range(IDENTITIES))
  tf.function(
    lambda: one.run(lambda: head.forward(HeadInput(embeddings, labels)).losses)
  )()
  reads = [variable.read_value() for _ in range(2)]
  first, second = (np.asarray(memoryview(read)).ctypes.data for read in reads)
  assert first == second


def test_outside_of_training_a_sampled_head_compares_all_and_keeps_its_statistics(
  two: tf.distribute.Strategy,
):
  embeddings, labels = batch(identities=2)
  found = sharded(
    two, "adaface", embeddings, labels, sample_rate=0.01, is_training=False
  )
  head = replicated.MarginHead(
    num_identities=IDENTITIES,
    embedding_size=EMBEDDING,
    seed=3,
    margin=margin_of("adaface"),
  )
  head.running_statistics.assign(STATISTICS["adaface"])
  losses = head.losses(head.margin_input(embeddings, labels), labels)
  np.testing.assert_allclose(found.output["losses"], losses, rtol=1e-5)
  np.testing.assert_allclose(found.output["running_statistics"], STATISTICS["adaface"])


def test_metrics_of_equal_and_of_large_cosines_are_the_replicated_heads(
  two: tf.distribute.Strategy,
):
  """Rows: right and wrong with p > 0.5, ties with earlier and later identities."""
  axes = np.eye(EMBEDDING, dtype=np.float32)
  weights = np.stack([*axes[:5], axes[1], axes[1]])
  embeddings = tf.constant(axes[[0, 4, 1, 1, 1, 2, 3, 0]])
  labels = tf.constant([0, 2, 6, 1, 5, 2, 5, 6])
  table = class_weights.RowTable(
    num_rows=IDENTITIES,
    row_shape=(EMBEDDING,),
    num_replicas=2,
    places=strategies.places(two),
  )
  for shard in table.shards:
    class_weights.write_rows(
      shard, "centres", shard.first, tf.constant(weights[shard.first : shard.stop])
    )
  head = ShardedHead(table, margin=margin_of("cosface"), scale=8.0)
  whole = replicated.MarginHead(
    num_identities=IDENTITIES,
    embedding_size=EMBEDDING,
    seed=0,
    margin=margin_of("cosface"),
    scale=8.0,
  )
  whole.class_weights.assign(weights)

  def replica() -> dict:
    start = 4 * this_replica()
    return vars(
      head.forward(HeadInput(embeddings[start : start + 4], labels[start : start + 4]))
    )

  parts = tf.function(lambda: two.run(replica))()
  expected = vars(whole.forward(HeadInput(embeddings, labels)))
  for name in ("is_correct", "is_true_positive", "is_false_positive"):
    found = np.concatenate(two.experimental_local_results(parts[name]))
    np.testing.assert_array_equal(found, expected[name], err_msg=name)
  assert expected["is_correct"].numpy().tolist() == [1, 0, 0, 1, 0, 1, 0, 0]
