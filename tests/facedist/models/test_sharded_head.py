"""The sharded head against the replicated one, and what both have in common."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from facedist.data import hashing
from facedist.distributed import strategies
from facedist.distributed.cluster import Cluster
from facedist.models.gather import this_replica
from facedist.models.heads import class_weights, replicated
from facedist.models.heads.base import HeadInput
from facedist.models.heads.margins import MARGINS, Margin
from facedist.models.heads.sharded import ShardedHead, is_sampled

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


@pytest.fixture(scope="module")
def one() -> tf.distribute.Strategy:
  return strategies.make_strategy("one", Cluster())


def margin_of(kind: str) -> Margin:
  """The head's defaults, for MagFace with a range around the norms of `batch`."""
  if kind == "magface":
    return MARGINS[kind](min_norm=1.0, max_norm=4.0)
  return MARGINS[kind]()


def batch(identities: int = IDENTITIES) -> tuple[tf.Tensor, tf.Tensor]:
  """Embeddings of norms about 2.4 and labels of all identities."""
  embeddings = np.random.default_rng(1).normal(size=(BATCH, EMBEDDING))
  labels = np.arange(BATCH) * 3 % identities
  return tf.constant(embeddings, tf.float32), tf.constant(labels, tf.int32)


def step_of(is_training: bool) -> tf.Tensor | None:
  return tf.constant(STEP, tf.int64) if is_training else None


def replicated_outcome(
  kind: str,
  embeddings: tf.Tensor,
  labels: tf.Tensor,
  *,
  is_training: bool = True,
  weights: np.ndarray | None = None,
  scale: float = 64.0,
) -> Result:
  """The replicated head's result, without a strategy."""
  head = replicated.MarginHead(
    num_identities=IDENTITIES,
    embedding_size=EMBEDDING,
    seed=3,
    margin=margin_of(kind),
    scale=scale,
    sub_centres=MARGINS[kind].default_sub_centres,
  )
  if weights is not None:
    head.class_weights.assign(weights)
  if head.running_statistics is not None:
    head.running_statistics.assign(STATISTICS[kind])
  with tf.GradientTape() as tape:
    tape.watch(embeddings)
    output = head.forward(HeadInput(embeddings, labels, step_of(is_training)))
    loss = tf.reduce_sum(output.losses) / BATCH
  by_embeddings, by_weights = tape.gradient(loss, [embeddings, head.class_weights])
  parts = {key: value.numpy() for key, value in vars(output).items()}
  return Result(parts, by_embeddings.numpy(), by_weights.numpy())


def table_of(strategy: tf.distribute.Strategy, kind: str) -> class_weights.RowTable:
  """The class weights of both heads, by their seed."""
  table = class_weights.RowTable(
    num_rows=IDENTITIES,
    row_shape=class_weights.row_shape(EMBEDDING, MARGINS[kind].default_sub_centres),
    num_replicas=strategy.num_replicas_in_sync,
    places=strategies.places(strategy),
  )
  table.draw_class_weights(3)
  return table


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

  Tracing takes ten times as long as the rest, so tests of many cases run without it.
  """
  table = table_of(strategy, kind)
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
    each = len(labels) // strategy.num_replicas_in_sync
    start = this_replica() * each
    own = embeddings[start : start + each]
    with tf.GradientTape() as tape:
      tape.watch([own, *head.own_class_weights()])
      output = head.forward(
        HeadInput(own, labels[start : start + each], step_of(is_training))
      )
      loss = tf.reduce_sum(output.losses) / BATCH
    by_own, by_rows = tape.gradient(loss, [own, *head.own_class_weights()])
    return vars(output), by_own, tf.convert_to_tensor(by_rows)

  def forward() -> tuple:
    return strategy.run(replica)

  outputs, by_own, by_rows = tf.nest.map_structure(
    lambda value: [part.numpy() for part in strategy.experimental_local_results(value)],
    (tf.function(forward) if is_traced else forward)(),
  )
  statistics = outputs.pop("running_statistics")
  assert all(np.array_equal(part, statistics[0]) for part in statistics)
  output = {key: np.concatenate(parts) for key, parts in outputs.items()}
  blocks = zip(by_rows, table.shards, strict=True)
  return Result(
    output | {"running_statistics": statistics[0]},
    np.concatenate(by_own),
    np.concatenate([rows[: shard.count] for rows, shard in blocks]),
  )


def assert_same(found: Result, expected: Result) -> None:
  for name, value in expected.output.items():
    left, right = found.output[name].astype(float), value.astype(float)
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5, err_msg=name)
  for name in ("by_embeddings", "by_weights"):
    left, right = getattr(found, name), getattr(expected, name)
    largest = np.abs(right).max()
    assert largest > 0
    close = {"rtol": 1e-4, "atol": 1e-5 * largest}
    np.testing.assert_allclose(left, right, **close, err_msg=name)


@pytest.mark.parametrize(
  ("kind", "sample_rate"),
  [
    *((kind, None) for kind in MARGINS),
    # a sample of all identities is the whole head
    *((kind, 1.0) for kind in ("cosface", "subcentre_arcface")),
  ],
)
def test_losses_and_gradients_are_the_replicated_heads(
  kind: str, sample_rate: float | None, two: tf.distribute.Strategy
):
  found = sharded(two, kind, *batch(), sample_rate=sample_rate)
  assert_same(found, replicated_outcome(kind, *batch()))


def test_metrics_of_equal_and_of_large_cosines_are_the_replicated_heads(
  two: tf.distribute.Strategy,
):
  """Rows: right and wrong with p > 0.5, ties with earlier and later identities."""
  axes = np.eye(EMBEDDING, dtype=np.float32)
  embeddings = tf.constant(axes[[0, 4, 1, 1, 1, 2, 3, 0]])
  labels = tf.constant([0, 2, 6, 1, 5, 2, 5, 6])
  given = {"weights": np.stack([*axes[:5], axes[1], axes[1]]), "scale": 8.0}
  found = sharded(two, "cosface", embeddings, labels, **given)
  assert_same(found, replicated_outcome("cosface", embeddings, labels, **given))
  assert found.output["is_correct"].tolist() == [1, 0, 0, 1, 0, 1, 0, 0]


def test_outside_of_training_a_sampled_head_compares_all_and_keeps_its_statistics(
  two: tf.distribute.Strategy,
):
  given = batch(identities=2)
  found = sharded(two, "adaface", *given, sample_rate=0.01, is_training=False)
  assert_same(found, replicated_outcome("adaface", *given, is_training=False))
  np.testing.assert_allclose(found.output["running_statistics"], STATISTICS["adaface"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", MARGINS)
def test_no_head_ever_gives_a_nan(kind: str, dtype: str, two: tf.distribute.Strategy):
  axes = np.eye(EMBEDDING)
  weights = np.zeros((IDENTITIES, EMBEDDING))  # all zero but for two
  weights[0], weights[5] = axes[0], axes[1]
  if (sub_centres := MARGINS[kind].default_sub_centres) > 1:
    weights = np.repeat(weights[:, None], sub_centres, axis=1)
  # cosines of 1, -1 and 0 with an own class weight, zero, tiny, mixed and huge vectors
  rows = [axes[0], -axes[0], axes[1], -axes[1], 0 * axes[0], np.ones(EMBEDDING)]
  huge = (6e4, -6e4) if dtype == "float16" else (1e20, -1e30)
  rows += [length * axes[0] for length in (6e-8, 1e-7, *huge)]
  embeddings = tf.cast(tf.constant(np.concatenate([rows] * 4), tf.float32), dtype)
  labels = tf.constant(np.repeat([0, 2, 5, 6], len(rows)), tf.int32)
  results = [replicated_outcome(kind, embeddings, labels, weights=weights)]
  for sample_rate in (None, 0.5):
    given = {"sample_rate": sample_rate, "is_traced": False, "weights": weights}
    results.append(sharded(two, kind, embeddings, labels, **given))
  for found in results:
    for value in (*found.output.values(), found.by_embeddings, found.by_weights):
      assert np.isfinite(value.astype(np.float32)).all()


def drawn(identities: np.ndarray, seed: int, step: int, rate: float) -> np.ndarray:
  """Which identities Partial FC draws, by the hash of the sample order."""
  hashes = hashing.combine(seed, np.array(step), identities)
  return (hashes >> np.uint64(32)).astype(np.float64) / 2**32 < rate


def sampled_identities(labels: tf.Tensor, rate: float) -> np.ndarray:
  """Those of the batch, and those that are drawn."""
  chosen = drawn(np.arange(IDENTITIES), 3, STEP, rate)
  chosen[np.unique(labels)] = True
  return chosen


@pytest.mark.parametrize(
  ("seed", "step", "rate"),
  [(0, 0, 0.25), (7, 12345, 0.1), (-3, 2**40, 0.9), (0, 1, 0.0), (0, 1, 1.0)],
)
def test_identities_are_drawn_by_a_hash_of_seed_step_and_identity(
  seed: int, step: int, rate: float
):
  identities = np.arange(1000, 3000)
  found = is_sampled(
    tf.constant(identities), seed=seed, step=tf.constant(step, tf.int64), rate=rate
  )
  np.testing.assert_array_equal(found, drawn(identities, seed, step, rate))
  assert abs(np.mean(found) - rate) < 0.04  # four deviations, at most


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


def test_one_replica_and_two_draw_the_same_sample(
  one: tf.distribute.Strategy, two: tf.distribute.Strategy
):
  given = batch(identities=2)
  alone = sharded(one, "arcface", *given, sample_rate=0.3)
  assert_same(sharded(two, "arcface", *given, sample_rate=0.3), alone)
  moved = np.abs(alone.by_weights).max(axis=1) > 0
  np.testing.assert_array_equal(moved, sampled_identities(given[1], 0.3))


def test_comparing_with_all_class_weights_after_a_sample_does_not_copy_them(
  one: tf.distribute.Strategy,
):
  table = table_of(one, "cosface")
  head = ShardedHead(table, sample_rate=0.1)

  def compare(*, is_training: bool) -> tf.Tensor:
    given = HeadInput(*batch(identities=2), step_of(is_training))
    return tf.function(lambda: one.run(lambda: head.forward(given).losses))()

  compare(is_training=True)
  compare(is_training=False)
  reads = [table.shards[0].variables["centres"].read_value() for _ in range(2)]
  first, second = (np.asarray(memoryview(read)).ctypes.data for read in reads)
  assert first == second
