"""Work on all cores: an ordered map over processes that end when their parent does."""

import collections
import concurrent.futures
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

import cv2

from facedist import errors

Task = TypeVar("Task")
Result = TypeVar("Result")

_TASKS_AHEAD = 3
"""Tasks a process may have waiting, so that it never waits for the parent."""


def available_cores() -> int:
  """Returns the cores that this process may run on."""
  return len(os.sched_getaffinity(0))


def ordered_map(
  function: Callable[[Task], Result],
  tasks: Iterable[Task],
  *,
  num_processes: int,
  preload: Sequence[str] = (),
) -> Generator[Result, None, None]:
  """Yields `function(task)` for each task, in order, computed in many processes.

  One process is this very one. Others come from a fork server: forking this process
  would copy whatever threads and locks its libraries have, and spawning would import
  everything in each of them.

  Args:
    function: Importable from a module.
    tasks: Taken as they are needed.
    num_processes: Processes to use.
    preload: Modules that the fork server imports, besides that of `function`, once
      for all processes; those of the first call in this process count.

  Raises:
    errors.FacedistError: A process died, such as for want of memory.
  """
  if num_processes == 1:
    yield from _map_here(function, tasks)
    return
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload([function.__module__, *preload])
  pool = concurrent.futures.ProcessPoolExecutor(
    num_processes, mp_context=context, initializer=_start_worker
  )
  try:
    yield from _map_in(pool, function, tasks, ahead=_TASKS_AHEAD * num_processes)
  except concurrent.futures.process.BrokenProcessPool as error:
    raise errors.FacedistError(
      "a worker process died, perhaps for want of memory; start again to go on, with "
      f"fewer than --num_processes={num_processes}."
    ) from error
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def _map_here(
  function: Callable[[Task], Result], tasks: Iterable[Task]
) -> Iterator[Result]:
  """Maps in this process, on one thread."""
  threads = cv2.getNumThreads()
  cv2.setNumThreads(1)
  try:
    yield from map(function, tasks)
  finally:
    cv2.setNumThreads(threads)


def _map_in(
  pool: concurrent.futures.Executor,
  function: Callable[[Task], Result],
  tasks: Iterable[Task],
  *,
  ahead: int,
) -> Iterator[Result]:
  """Keeps `ahead` tasks in the pool and yields results in the tasks' order."""
  tasks = iter(tasks)
  waiting = collections.deque(
    pool.submit(function, task) for task in itertools.islice(tasks, ahead)
  )
  while waiting:
    result = waiting.popleft().result()
    waiting.extend(pool.submit(function, task) for task in itertools.islice(tasks, 1))
    yield result


def _start_worker() -> None:
  """Prepares a worker: one thread, no interrupts, gone when the parent is gone."""
  gc.freeze()  # a collection would touch, and so copy, all that the server imported
  cv2.setNumThreads(1)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
  threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
  """Ends this process once its parent is dead, even if it was killed outright.

  A pool's workers otherwise wait for ever: each holds both ends of their queue.
  """
  parent = multiprocessing.parent_process()
  if parent is not None:
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
