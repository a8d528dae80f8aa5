"""Carries a plan out: makes the images in many processes and writes the shards."""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from facedist import errors, progress, storage
from tfrecords_tools import alignment, faces, ledger, parallel, plan, source, writing

_SAMPLE = 1000  # images whose landmarks are tried before work begins
_IMAGES_WORTH_A_PROCESS = 500  # below, starting one takes longer than the images


def write_shards(
  images: source.Source,
  shards: plan.Plan,
  *,
  mine: Sequence[plan.PlannedShard],
  book: ledger.Ledger,
  finished: Mapping[str, ledger.FinishedShard],
  output_dir: str,
  face: faces.FaceSettings,
  only: Collection[int] | None,
  max_bad: int,
  num_processes: int | None,
) -> dict[str, ledger.FinishedShard]:
  """Writes the shards that are not finished, in order.

  Args:
    images: The source.
    shards: The plan.
    mine: The shards of it that this task writes.
    book: Where each shard is noted once it is done.
    finished: The shards that an earlier run finished.
    output_dir: Local or in a bucket.
    face: How to make the training images.
    only: Numbers of the shards to write, finished or not; None is all unfinished ones.
    max_bad: Unreadable images that may be skipped; none may in a verification set.
    num_processes: None is one for each core, fewer for a few images.

  Returns:
    All that is finished now, by the shard's name.

  Raises:
    errors.DataError: More images are unreadable than may be.
    errors.UsageError: There is no shard of a number in `only`.
  """
  todo = _to_write(mine, finished, only)
  result = dict(finished)
  for shard in todo:
    if result.pop(shard.name, None):
      book.forget(shard.name)
  tolerance = _Tolerance(max_bad, images.explain_broken)
  for entry in result.values():
    tolerance.count(entry.skipped)
  if todo:
    _check_landmarks(shards.images_of(todo[0]).rows)
  remaining = sum(shard.num_images for shard in todo)
  chunks = (
    writing.chunks_of(images, shards.images_of(shard), settings=face) for shard in todo
  )
  written = parallel.ordered_map(
    writing.make_records,
    itertools.chain.from_iterable(chunks),
    num_processes=num_processes or _num_processes(remaining, images.origins),
  )
  shown = progress.Progress("built", total=remaining)
  with contextlib.closing(written), shown:
    for shard in todo:
      parts = itertools.islice(written, writing.num_chunks(shard.num_images))
      watched = _watched(parts, shown, tolerance=tolerance)
      result[shard.name] = writing.write_shard(output_dir, shard.name, written=watched)
      book.note(result[shard.name])
  return result


def _to_write(
  shards: Sequence[plan.PlannedShard],
  finished: Mapping[str, ledger.FinishedShard],
  only: Collection[int] | None,
) -> list[plan.PlannedShard]:
  """Returns the shards to write, in the plan's order."""
  if only is not None:
    numbers = {shard.number for shard in shards}
    if not numbers.issuperset(only):
      raise errors.UsageError(
        f"--only_shards: there is no shard {max(set(only) - numbers)}; they are "
        f"numbered from 0 to {max(numbers)}."
      )
    return [shard for shard in shards if shard.number in only]
  if finished:
    logging.info("going on: %d of %d shards are done", len(finished), len(shards))
  return [shard for shard in shards if shard.name not in finished]


def _check_landmarks(rows: np.ndarray) -> None:
  """Raises DataError if most of a sample of images have landmarks of no face."""
  sample = rows["geometry"][rows["place"] == faces.Place.LANDMARKS][:_SAMPLE]
  wrong = sum(not alignment.is_plausible(one.reshape(5, 2)) for one in sample)
  if wrong:
    logging.warning("landmarks of no face: %d of %d images tried", wrong, len(sample))
  if wrong > len(sample) / 2:
    raise errors.DataError(
      f"--landmarks: the points of {wrong} of {len(sample)} images can be no face's; "
      "expected are x1,y1,...,x5,y5 in pixels, not shares of the image's size: the eye "
      "on the image's left, the other, the nose, the mouth's left corner, the other."
    )


class _Tolerance:
  """Counts unreadable images, names each, and gives up past `max_bad`.

  At the first one where the set may lack none, which `explain_broken` then describes.
  """

  def __init__(
    self, max_bad: int, explain_broken: Callable[[str, str], str] | None
  ) -> None:
    self._max_bad = max_bad
    self._explain_broken = explain_broken
    self._num_bad = 0

  def count(self, skipped: Iterable[dict[str, str]]) -> None:
    """Counts some; DataError once there are too many."""
    for entry in skipped:
      if self._explain_broken is not None:
        raise errors.DataError(self._explain_broken(entry["path"], entry["reason"]))
      self._num_bad += 1
      logging.warning("skipped %s: %s", entry["path"], entry["reason"])
      if self._num_bad > self._max_bad:
        raise errors.DataError(
          f"{entry['path']}: {entry['reason']}. It is unreadable image number "
          f"{self._num_bad}, and {self._max_bad} may be; repair the images, or raise "
          "--max_bad, and start again to go on."
        )


def _watched(
  parts: Iterator[writing.Written], shown: progress.Progress, *, tolerance: _Tolerance
) -> Iterator[writing.Written]:
  """Passes chunks on, shows progress and counts unreadable images."""
  for part in parts:
    tolerance.count(part.skipped)
    shown.advance(part.num_images)
    yield part


def _num_processes(num_images: int, origins: Sequence[str]) -> int:
  """Returns a process for each core, fewer for a few images.

  From a bucket twice as many: each waits for its images while another computes.
  """
  most = parallel.available_cores()
  if any(map(storage.is_bucket, origins)):
    most *= 2
  return min(most, 1 + num_images // _IMAGES_WORTH_A_PROCESS)
