"""Stands around a training process: stop requests, lost peers, last words."""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping

import tensorflow as tf

from facedist import config, deadline, errors
from facedist.distributed import strategies
from facedist.distributed.cluster import Cluster
from facedist.distributed.failure_detector import FailureDetector, Timeouts
from facedist.distributed.preemption import Preemption

_EXIT_SECONDS = 60.0  # a last resort, for what stands in the way of the last words


@dataclasses.dataclass(frozen=True)
class Supervisor:
  """What hears the scheduler and what hears the peers."""

  interruption: Preemption
  detector: FailureDetector
  cluster: Cluster

  @contextlib.contextmanager
  def forming(self) -> Iterator[None]:
    """Waits for all workers, then lets the body form the strategy.

    Python runs no thread while TensorFlow forms its cluster, and TensorFlow has the
    signals; so all go into it together, and what came meanwhile is heeded afterwards.
    """
    self.detector.meet()
    self.detector.note("forming the cluster")
    yield
    self.interruption.take_signals()
    if self.cluster.num_workers > 1:
      threading.Thread(target=self._heed_swallowed, daemon=True).start()

  def end(self, error: errors.FacedistError) -> None:
    """Ends this process at once, from any thread; says why, to the peers too."""
    config.say_why(error)
    self.detector.leave(error.exit_code, str(error))
    _end_now(error.exit_code)

  def _heed_swallowed(self) -> None:
    """Heeds a SIGTERM to this worker that TensorFlow took; tells the peers, too."""
    if strategies.swallowed_sigterm() == self.cluster.index:
      self.interruption.heed(signal.SIGTERM.name)


@contextlib.contextmanager
def supervise(
  cluster: Cluster,
  *,
  facts: Mapping[str, str],
  timeouts: Timeouts,
  grace_seconds: float,
  heartbeat_file: str | None,
) -> Iterator[Supervisor]:
  """Waits for all workers, then guards the body; to be entered before the strategy.

  However the body ends, the peers are told, so that they need not wait to find out.

  Args:
    cluster: The cluster.
    facts: What must be the same on every worker.
    timeouts: How long to wait for what.
    grace_seconds: From a request to stop to the end.
    heartbeat_file: Touched with every heartbeat.

  Raises:
    errors.PeerLostError: A peer did not start, or was lost; names it.
    errors.ConfigError: A peer has another version or config; names it.
  """
  touch = _Toucher(heartbeat_file)
  detector = FailureDetector(cluster, facts=facts, timeouts=timeouts, on_beat=touch)

  def end(exit_code: int, reason: str) -> None:
    detector.leave(exit_code, reason)
    os._exit(exit_code)

  interruption = Preemption(grace_seconds=grace_seconds, end=end)
  with interruption.listen():
    detector.start()
    detector.wait_for_peers()
    detector.guard(lambda: 0)
    standstill = 2 * timeouts.peer if cluster.num_workers > 1 else timeouts.step
    with (
      _last_words(detector, is_alone=cluster.num_workers == 1),
      deadline.ended_unless_python_runs(standstill),
      _explained(detector, cluster),
    ):
      yield Supervisor(interruption, detector, cluster)


@contextlib.contextmanager
def _explained(detector: FailureDetector, cluster: Cluster) -> Iterator[None]:
  """Turns what TensorFlow raises when a peer is lost into a line that names it.

  Most often that is one of PEER_ERRORS, but no list of what NCCL and the runtime may
  raise is complete; so any error waits for a peer that is silent.
  """
  try:
    yield
  except tf.errors.OpError as error:
    is_loss = isinstance(error, strategies.PEER_ERRORS) and cluster.num_workers > 1
    failure = detector.explain(is_loss=is_loss)
    if failure is None and not is_loss:
      raise  # a bug, or what this worker's own devices lack
    if failure is None:
      reason = errors.first_line(error)
      raise errors.PeerLostError(
        "the connection to another worker was lost, though all are heard of; all "
        f"workers started again go on from the newest checkpoint ({reason})."
      ) from error
    raise failure.error() from error


@contextlib.contextmanager
def _last_words(detector: FailureDetector, *, is_alone: bool) -> Iterator[None]:
  """Tells the peers how the body ended, and sees to it that the process ends too.

  After an error TensorFlow's threads may wait for ever for a peer that is gone, so a
  worker of several ends here and now, with the exit code that its error calls for.
  """
  try:
    yield
  except errors.FacedistError as error:
    detector.leave(error.exit_code, str(error))
    _end_in_time()
    if not is_alone:
      config.say_why(error)
      _end_now(error.exit_code)
    raise
  except BaseException as error:
    detector.leave(errors.ExitCode.INTERNAL, f"{type(error).__name__}: {error}")
    _end_in_time()
    if not is_alone and isinstance(error, Exception):
      traceback.print_exc()
      _end_now(errors.ExitCode.INTERNAL)
    raise
  detector.leave(errors.ExitCode.DONE)


def _end_in_time() -> None:
  """Has the kernel end this process if it has not ended by itself by then."""
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  signal.alarm(math.ceil(_EXIT_SECONDS))


def _end_now(code: int) -> None:
  """Ends this process without a word to TensorFlow."""
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
      with contextlib.suppress(OSError):  # a full disk is no reason to be killed
        os.utime(self._path)
