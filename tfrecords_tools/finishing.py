"""The end of a build on many machines: is every shard there, whole, of this plan?"""

from collections.abc import Callable, Sequence

from facedist import errors
from tfrecords_tools import ledger, parts, plan

_NAMED = 20  # missing shards that a message names


def finished(
  shards: Sequence[plan.PlannedShard],
  *,
  book: ledger.Ledger,
  num_tasks: int,
  max_bad: int,
  explain_broken: Callable[[str, str], str] | None,
  output_dir: str,
) -> dict[str, ledger.FinishedShard]:
  """Returns every shard's marker.

  Args:
    shards: The plan's, in order.
    book: The build's ledger.
    num_tasks: Tasks that the shards were split over, to name those to run again.
    max_bad: Unreadable images that may have been skipped in all.
    explain_broken: See `source.Source`; with it, none may have been.
    output_dir: The build's folder, for messages.

  Raises:
    errors.DataError: A shard is missing, not whole or of another plan; or more images
      were skipped than may be.
    errors.ConfigError: The build has other settings or another input.
  """
  book.check_begun()
  done, missing = book.examine([shard.name for shard in shards])
  if missing:
    raise errors.DataError(_describe(shards, missing, num_tasks, output_dir))
  broken = [one for entry in done.values() for one in entry.skipped]
  if broken and explain_broken is not None:
    raise errors.DataError(explain_broken(broken[0]["path"], broken[0]["reason"]))
  if len(broken) > max_bad:
    raise errors.DataError(
      f"{len(broken)} images were unreadable in all tasks together, and {max_bad} may "
      "be; the tasks' logs name them; repair the images, or raise --max_bad."
    )
  return done


def _describe(
  shards: Sequence[plan.PlannedShard],
  missing: dict[str, str],
  num_tasks: int,
  output_dir: str,
) -> str:
  """Returns the message that names what is missing, by shard and by task."""
  whole = parts.Part(0, num_tasks)
  task_of = {
    shard.name: whole.task_of(place, len(shards)) for place, shard in enumerate(shards)
  }
  task = {name: f"task {task_of[name]}: " if num_tasks > 1 else "" for name in missing}
  named = [f"{name} ({task[name]}{reason})" for name, reason in missing.items()]
  if len(named) > _NAMED:
    named[_NAMED:] = [f"and {len(named) - _NAMED} more"]
  tasks = ",".join(map(str, sorted({task_of[name] for name in missing})))
  again = f"run tasks {tasks} again" if num_tasks > 1 else "build them"
  return (
    f"--output_dir={output_dir} lacks {len(missing)} of {len(shards)} shards: "
    f"{', '.join(named)}; {again}, then --finalize."
  )
