"""Surrounds training: handles signals, watches the peers, and ends the process."""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping

import tensorflow as tf

from facedist import config, deadline, errors
from facedist.distributed import strategies
from facedist.distributed.cluster import Cluster
from facedist.distributed.failure_detector import FailureDetector, Timeouts
from facedist.distributed.preemption import Preemption

_EXIT_SECONDS = 60.0  # a last resort, if something blocks the end of the process


@dataclasses.dataclass(frozen=True)
class Supervisor:
  """What receives the scheduler's signals and the peers' heartbeats."""

  preemption: Preemption
  detector: FailureDetector
  cluster: Cluster

  @contextlib.contextmanager
  def forming(self) -> Iterator[None]:
    """Waits for all workers, then lets the body form the strategy.

    While TensorFlow forms its cluster, no Python thread runs and its native handler
    takes the signals. So all workers start it at the same time, and a signal that came
    meanwhile is handled afterwards.
    """
    self.detector.synchronize()
    self.detector.note("forming the cluster")
    yield
    self.preemption.take_signals()
    if self.cluster.num_workers > 1:
      threading.Thread(target=self._handle_swallowed_sigterm, daemon=True).start()

  def watch_steps(
    self, count_arrivals: Callable[[], int], *, on_stop: Callable[[], None] | None
  ) -> None:
    """Watches the progress of training from here on.

    Args:
      count_arrivals: Returns how many gradients this worker has computed so far.
      on_stop: Called once when the scheduler asks this worker to stop; None if the
        process is to end at once, since there is nothing to save.
    """
    if on_stop is not None:
      self.preemption.arm(on_stop)
    self.detector.begin_training(count_arrivals)

  def end(self, error: errors.FacedistError) -> None:
    """Ends this process at once, from any thread; tells the user and the peers why."""
    config.say_why(error)
    self.detector.leave(error.exit_code, str(error))
    _exit_now(error.exit_code)

  def _handle_swallowed_sigterm(self) -> None:
    """Handles a SIGTERM to this worker that TensorFlow took and told the peers of."""
    if strategies.swallowed_sigterm() == self.cluster.index:
      self.preemption.handle(signal.SIGTERM.name)


@contextlib.contextmanager
def supervise(
  cluster: Cluster,
  *,
  facts: Mapping[str, str],
  timeouts: Timeouts,
  grace_seconds: float,
  heartbeat_file: str | None,
) -> Iterator[Supervisor]:
  """Waits for all workers, then watches them while the body runs.

  To be entered before the strategy is formed. However the body ends, the peers are
  told, so that they need not wait to find out.

  Args:
    cluster: The cluster.
    facts: What must be the same on every worker.
    timeouts: How long to wait.
    grace_seconds: From a request to stop to the end.
    heartbeat_file: Touched with every heartbeat.

  Raises:
    errors.PeerLostError: A peer did not start, or was lost; names it.
    errors.ConfigError: A peer has another version or config; names it.
  """
  touch = _Toucher(heartbeat_file)
  detector = FailureDetector(
    cluster, facts=facts, timeouts=timeouts, on_heartbeat=touch
  )

  def end(exit_code: int, reason: str) -> None:
    detector.leave(exit_code, reason)
    os._exit(exit_code)

  preemption = Preemption(grace_seconds=grace_seconds, end=end)
  with preemption.listen():
    detector.start()
    detector.join()
    detector.begin_training(lambda: 0)
    is_alone = cluster.num_workers == 1
    with (
      _end_with_process(detector, is_alone=is_alone),
      deadline.ended_unless_python_runs(
        timeouts.step if is_alone else 2 * timeouts.peer
      ),
      _name_lost_peer(detector, cluster),
    ):
      yield Supervisor(preemption, detector, cluster)


@contextlib.contextmanager
def _name_lost_peer(detector: FailureDetector, cluster: Cluster) -> Iterator[None]:
  """Turns what TensorFlow raises when a peer is lost into an error that names it.

  Most often that is one of PEER_ERRORS, but there is no complete list of what NCCL and
  the runtime may raise. So after any error this waits for a peer to be silent.
  """
  try:
    yield
  except tf.errors.OpError as error:
    is_loss = isinstance(error, strategies.PEER_ERRORS) and cluster.num_workers > 1
    failure = detector.explain(is_loss=is_loss)
    if failure is None and not is_loss:
      raise  # a bug, or a fault of this worker's own devices
    if failure is None:
      reason = errors.first_line(error)
      raise errors.PeerLostError(
        f"the connection to another worker was lost ({reason}), but all send "
        "heartbeats; start all workers again to continue from the newest checkpoint."
      ) from error
    raise failure.error() from error


@contextlib.contextmanager
def _end_with_process(detector: FailureDetector, *, is_alone: bool) -> Iterator[None]:
  """Tells the peers how the body ended, and makes sure that the process ends too.

  After an error, TensorFlow's threads may wait for ever for a lost peer. So a worker of
  several ends its process here, with the exit code of the error.
  """
  try:
    yield
  except errors.FacedistError as error:
    detector.leave(error.exit_code, str(error))
    _set_exit_alarm()
    if not is_alone:
      config.say_why(error)
      _exit_now(error.exit_code)
    raise
  except BaseException as error:
    detector.leave(errors.ExitCode.INTERNAL, f"{type(error).__name__}: {error}")
    _set_exit_alarm()
    if not is_alone and isinstance(error, Exception):
      traceback.print_exc()
      _exit_now(errors.ExitCode.INTERNAL)
    raise
  detector.leave(errors.ExitCode.DONE)


def _set_exit_alarm() -> None:
  """Lets the kernel end this process if it does not end by itself in time."""
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  signal.alarm(math.ceil(_EXIT_SECONDS))


def _exit_now(code: int) -> None:
  """Ends this process without shutting TensorFlow down."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(int(code))


class _Toucher:
  """Touches a file, if there is one to touch."""

  def __init__(self, path: str | None) -> None:
    self._path = path
    if path is None:
      return
    try:
      os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
      with open(path, "a", encoding="utf-8"):
        pass
    except OSError as error:
      raise errors.UsageError(
        f"--heartbeat_file={path} cannot be written ({error.strerror}); choose another."
      ) from error

  def __call__(self) -> None:
    if self._path is not None:
      with contextlib.suppress(OSError):  # a full disk is no reason to end
        os.utime(self._path)
