"""A validation pass over all records of a split, inside one graph."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from facedist.training import metrics
from facedist.training.batches import Batch
from facedist.training.state import TrainState
from facedist.training.vitals import Vitals


def validation_loop(
  state: TrainState,
  strategy: tf.distribute.Strategy,
  vitals: Vitals,
) -> Callable[[Any, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
  """Compiles a validation pass.

  Returns:
    A function of (distributed iterator, int32[] batches) that returns
    float32[len(metrics.SUMS)] over all records, padding left out, and bool[], whether
    it got to the end: it stops short when a worker is asked to stop.
  """

  @tf.autograph.experimental.do_not_convert
  def replica_sums(batch: Batch) -> tf.Tensor:
    embeddings = state.network.embed(batch["image"])
    verdict = state.head.judge(embeddings, batch["label"])
    with tf.control_dependencies([verdict.losses]):
      vitals.arrivals.assign_add(1)
    sums = metrics.sums(verdict, weights=batch["weight"], damaged=batch["damaged"])
    return tf.concat([sums, [vitals.stop.read_value()]], axis=0)

  @tf.function
  def loop(iterator: Any, num_batches: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    totals = tf.zeros(len(metrics.SUMS) + 1)
    done = tf.constant(0)
    while done < num_batches and totals[-1] == 0.0:
      sums = strategy.run(replica_sums, args=(next(iterator),))
      totals += strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)
      done += 1
    return totals[:-1], tf.equal(done, num_batches)

  return loop
