"""What holds while TensorFlow's cluster forms: an end in time, and its patience."""

import contextlib
import faulthandler
import math
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
  """Ends the process, with SIGALRM and its stacks, if the body takes longer.

  A cluster that lost a worker while it was forming waits for ever, in native code that
  holds the interpreter's lock; so only the kernel can end it. A restart mends it.
  """
  faulthandler.dump_traceback_later(seconds)
  before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
  signal.alarm(math.ceil(seconds) + 1)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    faulthandler.cancel_dump_traceback_later()


def set_heartbeat(num_workers: int, seconds: float) -> None:
  """Sets how long TensorFlow's own service does without a word of a worker.

  A private interface of TensorFlow 2.15; its default of 10 s would end a job that
  --peer_timeout has more patience with.
  """
  from tensorflow.python.eager import context
  from tensorflow.tsl.protobuf import coordination_config_pb2

  jobs = [coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=num_workers)]
  context.context().configure_coordination_service(
    service_type="standalone",
    service_leader="/job:worker/replica:0/task:0",
    heartbeat_timeout_in_ms=round(1000 * seconds),
    coordinated_jobs=jobs,
  )
