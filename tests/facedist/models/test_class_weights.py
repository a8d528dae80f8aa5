import numpy as np
import pytest
import tensorflow as tf

from facedist.models.heads import class_weights


def table(num_rows: int, num_replicas: int, **more) -> class_weights.RowTable:
  places = dict.fromkeys(range(num_replicas), "CPU:0")
  given = {"row_shape": (4,), "places": places} | more
  return class_weights.RowTable(num_rows=num_rows, num_replicas=num_replicas, **given)


@pytest.mark.parametrize(
  ("num_rows", "num_replicas", "expected"),
  [
    (6, 2, [(0, 3), (3, 6)]),
    (7, 2, [(0, 4), (4, 7)]),
    (7, 3, [(0, 3), (3, 6), (6, 7)]),
    (5, 4, [(0, 2), (2, 4), (4, 5), (5, 5)]),
    (1, 3, [(0, 1), (1, 1), (1, 1)]),
  ],
)
def test_rows_are_dealt_out_in_blocks_and_the_last_may_be_empty(
  num_rows: int, num_replicas: int, expected: list[tuple[int, int]]
):
  dealt = table(num_rows, num_replicas)
  assert [(shard.first, shard.stop) for shard in dealt.shards] == expected
  assert [shard.count for shard in dealt.shards] == [b - a for a, b in expected]
  shapes = {tuple(shard.variables["centres"].shape) for shard in dealt.shards}
  assert shapes == {(dealt.rows_each, 4)}


def test_a_process_holds_the_blocks_of_its_own_replicas_on_their_devices(
  two_replicas: tf.distribute.MirroredStrategy,
):
  dealt = table(9, 4, places={3: "CPU:1", 2: "CPU:0"}, slots=("momentum",))
  assert [shard.replica for shard in dealt.shards] == [2, 3]
  assert dealt.columns == ("centres", "momentum")
  for shard, device in zip(dealt.shards, ("CPU:0", "CPU:1"), strict=True):
    assert tuple(shard.variables) == dealt.columns
    for variable in shard.variables.values():
      assert variable.device.endswith(device)
      assert not variable.trainable


@pytest.mark.parametrize(
  ("num_rows", "num_replicas", "piece_rows", "row_shape"),
  [(20, 2, 1, (4,)), (2500, 3, 7, (5,)), (2500, 1, 5000, (3, 7))],
)
def test_initial_class_weights_depend_on_seed_and_identity_alone(
  num_rows: int, num_replicas: int, piece_rows: int, row_shape: tuple[int, ...]
):
  dealt = table(num_rows, num_replicas, slots=("momentum",), row_shape=row_shape)
  dealt.draw_class_weights(3, piece_rows=piece_rows)
  drawn = np.concatenate(
    [shard.variables["centres"][: shard.count] for shard in dealt.shards]
  )
  expected = class_weights.initial_rows(3, 0, 4000, row_shape=row_shape)
  np.testing.assert_array_equal(drawn, expected[:num_rows])
  last = dealt.shards[-1]
  assert not last.variables["momentum"].numpy().any()
  assert not last.variables["centres"].numpy()[last.count :].any()


def test_initial_class_weights_are_normal_and_all_different():
  drawn = class_weights.initial_rows(0, 0, 5000, row_shape=(3, 8)).numpy()
  np.testing.assert_allclose(drawn.mean(), 0, atol=1e-4)
  np.testing.assert_allclose(drawn.std(), 0.01, rtol=0.01)
  assert len(np.unique(drawn.reshape(len(drawn), -1), axis=0)) == 5000
  others = class_weights.initial_rows(1, 0, 5000, row_shape=(3, 8)).numpy()
  assert not np.isclose(drawn, others, atol=1e-9).all(axis=(1, 2)).any()


def test_a_step_does_not_copy_a_block_for_having_been_read_or_written_in_pieces():
  (shard,) = table(9, 1).shards
  variable = shard.variables["centres"]

  def address(read: tf.Tensor) -> int:
    return np.asarray(memoryview(read)).ctypes.data

  class_weights.write_rows(shard, "centres", 0, tf.ones((3, 4)))
  class_weights.read_rows(shard, "centres", 0, 3)
  first, second = variable.read_value(), variable.read_value()
  assert address(first) == address(second)
  tf.gather(variable, [0])  # what makes the difference
  third, fourth = variable.read_value(), variable.read_value()
  assert address(third) != address(fourth)
