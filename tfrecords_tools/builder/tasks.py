"""A task's shards of a build: from flags, a Slurm array or a Kubernetes Indexed Job."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from facedist import errors

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class BuildTask:
  """Task `index` of `count`."""

  index: int = 0
  count: int = 1

  def of(self, items: Sequence[Item]) -> Sequence[Item]:
    """Returns this task's items: a contiguous range, of equal size or one larger."""
    first, end = (
      len(items) * task // self.count for task in (self.index, self.index + 1)
    )
    return items[first:end]

  def task_of(self, place: int, num_items: int) -> int:
    """Returns the task that has the item at `place` of `num_items`."""
    return ((place + 1) * self.count - 1) // num_items


def find_task(
  num_tasks: int | None, task_index: int | None, environ: Mapping[str, str]
) -> BuildTask:
  """Returns this task.

  With --num_tasks, an array's task ID is the index, so `sbatch --array=5` builds the
  shards of task 5 again. Without it, the array gives the number of tasks. A Kubernetes
  Indexed Job does not tell its number of tasks, so it needs the flag.

  Args:
    num_tasks: --num_tasks, or None.
    task_index: --task_index, or None.
    environ: The process's environment.

  Raises:
    errors.UsageError: The flags and the environment do not say which.
  """
  if num_tasks is None:
    if task_index is not None:
      raise errors.UsageError(f"--task_index={task_index} needs --num_tasks.")
    return _task_of_array(environ)
  if task_index is not None:
    origin, index = "--task_index", task_index
  elif num_tasks == 1:
    return BuildTask()
  else:
    origin, index = _index_from_environment(num_tasks, environ)
  if not 0 <= index < num_tasks:
    raise errors.UsageError(
      f"{origin}={index} is no task of --num_tasks={num_tasks}; they are numbered from "
      f"0 to {num_tasks - 1}."
    )
  return BuildTask(index, num_tasks)


def _index_from_environment(
  num_tasks: int, environ: Mapping[str, str]
) -> tuple[str, int]:
  """Returns the name and the value of the variable that numbers this task."""
  for name in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
    if name in environ:
      return name, _number(environ, name)
  raise errors.UsageError(
    f"--num_tasks={num_tasks} needs --task_index outside a Slurm array or an Indexed "
    "Job; to write the manifest once all tasks are done, say --finalize."
  )


def _task_of_array(environ: Mapping[str, str]) -> BuildTask:
  """Returns the task by the environment alone; the only one outside of any array."""
  if "SLURM_ARRAY_TASK_ID" in environ:
    task, count, first, last, step = (
      _number(environ, f"SLURM_ARRAY_TASK_{name}", default)
      for name, default in (
        ("ID", None),
        ("COUNT", None),
        ("MIN", None),
        ("MAX", -1),
        ("STEP", 1),
      )
    )
    if last >= 0 and (last - first) // step + 1 != count:
      raise errors.UsageError(
        f"this Slurm array has {count} tasks between {first} and {last}, which are not "
        "evenly numbered; say --num_tasks, and number the tasks from 0."
      )
    return BuildTask((task - first) // step, count)
  if "JOB_COMPLETION_INDEX" in environ:
    raise errors.UsageError(
      f"JOB_COMPLETION_INDEX={environ['JOB_COMPLETION_INDEX']} says that this is one "
      "of several tasks; say --num_tasks=N, N being the Job's completions."
    )
  return BuildTask()


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
  """Returns a variable's number; UsageError if there is none."""
  text = environ.get(name)
  if text is None and default is not None:
    return default
  if text is None or not text.isdecimal():
    raise errors.UsageError(
      f"{name}={text} is no number; say --num_tasks and --task_index."
    )
  return int(text)
