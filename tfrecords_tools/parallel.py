"""An ordered map over processes, which end when their parent does."""

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
"""Tasks that are submitted for each process, so that none waits for the parent."""


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

  With one process, the map runs in this one. Otherwise processes come from a fork
  server: forking this process would copy the threads and locks of its libraries, and
  spawning would import everything in each process.

  Args:
    function: Importable from a module.
    tasks: Taken as they are needed.
    num_processes: Processes to use.
    preload: Modules that the fork server imports once for all processes, besides that
      of `function`; only the first call in this process decides.

  Raises:
    errors.FacedistError: A process died, for example for lack of memory.
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
      "a worker process died, perhaps for lack of memory; start again to continue, "
      f"with fewer than --num_processes={num_processes}."
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
  """Prepares a worker: one thread, no interrupts, and it ends with its parent."""
  gc.freeze()  # a collection would write to, and so copy, the server's memory
  cv2.setNumThreads(1)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
  threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
  """Ends this process once its parent has ended, even if it was killed.

  Workers of a pool would otherwise wait forever: each holds both ends of their queue.
  """
  parent = multiprocessing.parent_process()
  if parent is not None:
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
