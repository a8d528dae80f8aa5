import tensorflow as tf

from facedist.training import train_step


def test_a_step_waits_for_the_clock_that_says_how_long_its_batch_took():
  """A lone thread would otherwise look at the clock after the whole step."""
  with tf.Graph().as_default() as graph:
    arriving = {name: tf.random.uniform([3]) for name in ("image", "label")}
    batch, _ = train_step.timed_next(
      iter([arriving]), tf.distribute.get_strategy(), deterministic=False
    )
  clocks = [op for op in graph.get_operations() if op.type == "Timestamp"]
  ended = [op for op in clocks if arriving["label"].op in before(op)]
  assert len(clocks) == 2
  assert len(ended) == 1
  for part in batch.values():
    assert ended[0] in before(part.op)


def before(operation: tf.Operation) -> list[tf.Operation]:
  """Returns all operations that come before this one."""
  found: list[tf.Operation] = []
  waiting = [operation]
  while waiting:
    current = waiting.pop()
    for earlier in (*(each.op for each in current.inputs), *current.control_inputs):
      if earlier not in found:
        found.append(earlier)
        waiting.append(earlier)
  return found
