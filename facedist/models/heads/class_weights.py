"""Class weights and their optimizer's slots, sharded over the replicas.

A replica holds a block of consecutive identities, so that no process holds the whole
table. The variables are plain ones: the strategy neither mirrors nor sums them.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import tensorflow as tf

from facedist.models.gather import this_replica

CLASS_WEIGHTS = "centres"
"""The name of the class weights in checkpoints, as a column and as a variable."""
PIECE_ROWS = 65_536
"""Rows that are drawn, read or written at a time where nothing else is asked for."""
_PHILOX = 1  # TensorFlow's number of that generator
_NORMALS_PER_COUNT = 4  # from one value of Philox's counter


def row_shape(embedding_size: int, sub_centres: int = 1) -> tuple[int, ...]:
  """Returns the shape of an identity's row: (embedding,), or (K, embedding)."""
  return (embedding_size,) if sub_centres == 1 else (sub_centres, embedding_size)


def initial_rows(
  seed: int, first: int, stop: int, *, row_shape: tuple[int, ...]
) -> tf.Tensor:
  """Draws initial class weights of identities [first, stop): normal, deviation 0.01.

  Every identity has its own range of the generator's counter, so its class weights
  depend on the seed and the identity alone.

  Returns:
    float32[stop - first, *row_shape], drawn on the CPU, since another device may draw
    other numbers.
  """
  width = math.prod(row_shape)
  draws_each = -(-width // _NORMALS_PER_COUNT)
  with tf.device("CPU:0"):
    start = tf.raw_ops.StatelessRandomGetKeyCounter(seed=(seed, 0))
    normals = tf.raw_ops.StatelessRandomNormalV2(
      shape=(stop - first, draws_each * _NORMALS_PER_COUNT),
      key=start.key,
      counter=start.counter + tf.constant([first * draws_each, 0], tf.uint64),
      alg=_PHILOX,
    )
    return 0.01 * tf.reshape(normals[:, :width], (-1, *row_shape))


@dataclasses.dataclass(frozen=True)
class RowRange:
  """One replica's block of the table.

  Attributes:
    replica: Its number among all replicas.
    first: Its first identity.
    stop: The identity after its last; `first` where it has none.
    device: Where its variables are.
    variables: By column, float32[rows_each, *row_shape]; row i is of identity
      first + i, and rows from stop - first on are padding, zeros that are never read.
  """

  replica: int
  first: int
  stop: int
  device: str
  variables: Mapping[str, tf.Variable]

  @property
  def count(self) -> int:
    """How many identities it has."""
    return self.stop - self.first


class RowTable:
  """Float32 rows by identity in contiguous blocks, one block a replica.

  Attributes:
    num_rows: Identities of the whole job.
    row_shape: (embedding,), or (K, embedding) with K sub-centres.
    num_replicas: Number of replicas, in all processes.
    rows_each: Rows of a block; the last blocks may have fewer, or none.
    columns: The class weights, then the optimizer's slots.
    shards: The blocks of this process, in the order of their replicas.
  """

  def __init__(
    self,
    *,
    num_rows: int,
    row_shape: tuple[int, ...],
    slots: tuple[str, ...] = (),
    num_replicas: int = 1,
    places: Mapping[int, str],
  ) -> None:
    """Makes all rows zero; call it outside the strategy's scope.

    Args:
      num_rows: Identities of the whole job.
      row_shape: Of one identity.
      slots: Names of the optimizer's columns.
      num_replicas: Number of replicas, in all processes.
      places: The replicas of this process, and the device of each.
    """
    self.num_rows = num_rows
    self.row_shape = row_shape
    self.num_replicas = num_replicas
    self.rows_each = -(-num_rows // num_replicas)
    self.columns = (CLASS_WEIGHTS, *slots)
    self.shards = tuple(
      self._shard(replica, places[replica]) for replica in sorted(places)
    )

  def _shard(self, replica: int, device: str) -> RowRange:
    """Makes one replica's variables on its device."""
    with tf.device(device):
      variables = {
        column: tf.Variable(
          tf.zeros((self.rows_each, *self.row_shape)), trainable=False, name=column
        )
        for column in self.columns
      }
    first = min(replica * self.rows_each, self.num_rows)
    stop = min(first + self.rows_each, self.num_rows)
    return RowRange(replica, first, stop, device, variables)

  def own_shard(self) -> RowRange:
    """Returns the calling replica's block; call in replica context."""
    replica = this_replica()
    return next(shard for shard in self.shards if shard.replica == replica)

  def draw_class_weights(self, seed: int, *, piece_rows: int = PIECE_ROWS) -> None:
    """Sets the class weights to initial values, `piece_rows` of them at a time."""
    for shard in self.shards:
      for first, stop in pieces(shard.first, shard.stop, piece_rows):
        values = initial_rows(seed, first, stop, row_shape=self.row_shape)
        write_rows(shard, CLASS_WEIGHTS, first, values)


def pieces(first: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
  """Splits [first, stop) into ranges of at most `size` and yields these."""
  for start in range(first, stop, size):
    yield start, min(start + size, stop)


def read_rows(shard: RowRange, column: str, first: int, stop: int) -> tf.Tensor:
  """Returns float32[stop - first, *row_shape] of identities [first, stop).

  It reads only these: a slice of the variable's value would copy all of it first.
  """
  with tf.device(shard.device):
    rows = tf.range(first - shard.first, stop - shard.first)
    found = tf.gather(shard.variables[column], rows)
    share_reads(shard.variables[column])
    return found


def write_rows(shard: RowRange, column: str, first: int, values: tf.Tensor) -> None:
  """Sets the rows of identities [first, first + len(values)) in place."""
  with tf.device(shard.device):
    start = first - shard.first
    rows = tf.range(start, start + len(values))
    shard.variables[column].scatter_update(tf.IndexedSlices(values, rows))
    share_reads(shard.variables[column])


def share_reads(variable: tf.Variable) -> None:
  """Makes reads of a whole variable share its memory again.

  Once single rows were read or written, TensorFlow copies it at every whole read.
  """
  tf.raw_ops.DisableCopyOnRead(resource=variable.handle)
