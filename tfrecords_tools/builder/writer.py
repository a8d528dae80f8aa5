"""Writes the shards of a plan: many processes make chunks, one writes them in order."""

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import google_crc32c
import numpy as np
from absl import logging

from facedist import errors, progress, storage
from facedist.data import alignment
from facedist.data.shards import manifest, shard_index, tfrecord
from tfrecords_tools import parallel
from tfrecords_tools.builder import plan, state
from tfrecords_tools.sources import base

Result = TypeVar("Result")
IMAGES_A_CHUNK = 128  # 0.05 s of work; shorter ones cost the parent more
_PROBE_BYTES = 16  # nothing before the image in a record starts as a JPEG does
_SAMPLE = 1000  # images whose landmarks are checked before work begins
_IMAGES_WORTH_A_PROCESS = 500  # below, starting one takes longer than the images


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Some neighbouring images of a shard: a process's unit of work.

  Attributes:
    paths: identity/image.
    files: The files that they lie in.
    rows: base.ROW_DTYPE[images].
    contents: The encoded images, where the source holds them in memory; or None.
    unwrap: See `base.Source.unwrap`.
    settings: How to make the faces.
  """

  paths: Sequence[str]
  files: list[str]
  rows: np.ndarray
  contents: list[bytes] | None
  unwrap: Callable[[bytes], bytes] | None
  settings: alignment.FaceSettings


@dataclasses.dataclass(frozen=True)
class WrittenChunk:
  """A chunk's framed records.

  Attributes:
    content: The records, one after another.
    rows: INDEX_DTYPE[records]; offsets count from the start of `content`.
    methods: Number of images made by each method.
    skipped: `path` and `reason` of the images that could not be read.
  """

  content: bytes
  rows: np.ndarray
  methods: collections.Counter[str]
  skipped: list[dict[str, str]]

  @property
  def num_images(self) -> int:
    """Number of source images, those skipped included."""
    return len(self.rows) + len(self.skipped)


def write_shards(
  images: base.Source,
  shards: plan.Plan,
  *,
  mine: Sequence[plan.PlannedShard],
  build_state: state.BuildState,
  finished: Mapping[str, state.FinishedShard],
  output_dir: str,
  face: alignment.FaceSettings,
  only: Collection[int] | None,
  max_bad: int,
  num_processes: int | None,
) -> dict[str, state.FinishedShard]:
  """Writes the shards that are not finished, in order.

  Args:
    images: The source.
    shards: The plan.
    mine: The shards of it that this task writes.
    build_state: Gets a marker for each shard that is finished.
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
    errors.UsageError: A number in `only` is no shard's.
  """
  todo = _to_write(mine, finished, only)
  result = dict(finished)
  for shard in todo:
    if result.pop(shard.name, None):
      build_state.unmark(shard.name)
  tolerance = _Tolerance(max_bad, images.explain_broken)
  for entry in result.values():
    tolerance.count(entry.skipped)
  if todo:
    _check_landmarks(shards.images_of(todo[0]).rows)
  remaining = sum(shard.num_images for shard in todo)
  chunks = (chunks_of(images, shards.images_of(shard), settings=face) for shard in todo)
  written = parallel.ordered_map(
    make_records,
    itertools.chain.from_iterable(chunks),
    num_processes=num_processes or _num_processes(remaining, images.origins),
  )
  shown = progress.Progress("built", total=remaining)
  with contextlib.closing(written), shown:
    for shard in todo:
      made = itertools.islice(written, num_chunks(shard.num_images))
      watched = _watched(made, shown, tolerance=tolerance)
      result[shard.name] = write_shard(output_dir, shard.name, written=watched)
      build_state.mark_finished(result[shard.name])
  return result


def _to_write(
  shards: Sequence[plan.PlannedShard],
  finished: Mapping[str, state.FinishedShard],
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
    logging.info("continuing: %d of %d shards are done", len(finished), len(shards))
  return [shard for shard in shards if shard.name not in finished]


def _check_landmarks(rows: np.ndarray) -> None:
  """Raises DataError if most of a sample of images have implausible landmarks."""
  sample = rows["geometry"][rows["place"] == alignment.Place.LANDMARKS][:_SAMPLE]
  wrong = sum(not alignment.is_plausible(one.reshape(5, 2)) for one in sample)
  if wrong:
    logging.warning(
      "implausible landmarks: %d of the first %d images", wrong, len(sample)
    )
  if wrong > len(sample) / 2:
    raise errors.DataError(
      f"--landmarks: the points of {wrong} of {len(sample)} images cannot be a face's; "
      "expected are x1,y1,...,x5,y5 in pixels, not fractions of the image's size: the "
      "eye on the image's left, the other, the nose, the mouth's left corner, the "
      "other."
    )


class _Tolerance:
  """Counts and logs unreadable images; raises DataError above `max_bad`.

  Where the set needs every image, `explain_broken` describes the first one.
  """

  def __init__(
    self, max_bad: int, explain_broken: Callable[[str, str], str] | None
  ) -> None:
    self._max_bad = max_bad
    self._explain_broken = explain_broken
    self._num_bad = 0

  def count(self, skipped: Iterable[dict[str, str]]) -> None:
    """Counts more unreadable images; DataError if there are too many."""
    for entry in skipped:
      if self._explain_broken is not None:
        raise errors.DataError(self._explain_broken(entry["path"], entry["reason"]))
      self._num_bad += 1
      logging.warning("skipped %s: %s", entry["path"], entry["reason"])
      if self._num_bad > self._max_bad:
        raise errors.DataError(
          f"{entry['path']}: {entry['reason']}. It is unreadable image number "
          f"{self._num_bad}, and {self._max_bad} may be; repair the images, or raise "
          "--max_bad, and start again to continue."
        )


def _watched(
  chunks: Iterator[WrittenChunk], shown: progress.Progress, *, tolerance: _Tolerance
) -> Iterator[WrittenChunk]:
  """Yields the chunks, shows progress and counts unreadable images."""
  for chunk in chunks:
    tolerance.count(chunk.skipped)
    shown.advance(chunk.num_images)
    yield chunk


def _num_processes(num_images: int, origins: Sequence[str]) -> int:
  """Returns a process for each core, fewer for a few images.

  Twice as many for a bucket: one waits for its images while another computes.
  """
  most = parallel.available_cores()
  if any(map(storage.is_bucket, origins)):
    most *= 2
  return min(most, 1 + num_images // _IMAGES_WORTH_A_PROCESS)


def chunks_of(
  images: base.Source, planned: plan.Images, *, settings: alignment.FaceSettings
) -> Iterator[Chunk]:
  """Cuts a shard's images into chunks, in order."""
  held = images.contents
  for start in range(0, len(planned.rows), IMAGES_A_CHUNK):
    rows = planned.rows[start : start + IMAGES_A_CHUNK]
    paths = planned.paths[start : start + IMAGES_A_CHUNK]
    numbers = rows["start"].tolist()
    yield Chunk(
      paths=paths,
      files=base.files_of(rows, paths, origins=images.origins),
      rows=rows,
      contents=None if held is None else [held[number] for number in numbers],
      unwrap=images.unwrap,
      settings=settings,
    )


def num_chunks(num_images: int) -> int:
  """Returns how many chunks a shard of so many images is cut into."""
  return -(-num_images // IMAGES_A_CHUNK)


def make_records(chunk: Chunk) -> WrittenChunk:
  """Reads, aligns and encodes a chunk's images and frames them as records.

  Each step runs over the whole chunk before the next one starts: its code then stays in
  the processor's caches, and the step takes half the time.
  """
  size = chunk.settings.size
  sources = chunk.contents or base.read_all(chunk.files, chunk.rows)
  if chunk.unwrap is not None:
    sources = _step(chunk.unwrap, sources)
  plan_cut = functools.partial(alignment.plan_cut, size=size)
  cuts = _step(plan_cut, chunk.rows["geometry"], chunk.rows["place"].tolist())
  make_face = functools.partial(alignment.make_face, settings=chunk.settings)
  made = _step(make_face, sources, cuts)
  written: list[bytes] = []
  index: list[tuple[int, int, int, int, int]] = []
  methods: collections.Counter[str] = collections.Counter()
  skipped = []
  offset = 0
  labels = chunk.rows["label"].tolist()
  for path, label, face in zip(chunk.paths, labels, made, strict=True):
    if isinstance(face, errors.DataError):
      skipped.append({"path": path, "reason": str(face)})
      continue
    jpeg, method = face
    record = tfrecord.Record(jpeg, label, base.identity_of(path), path)
    payload = tfrecord.serialize(record)
    image_offset = tfrecord.HEADER_BYTES + payload.index(jpeg[:_PROBE_BYTES])
    framed = tfrecord.frame(payload)
    written.append(framed)
    index.append((offset, len(framed), image_offset, len(jpeg), label))
    methods[method] += 1
    offset += len(framed)
  rows = np.array(index, shard_index.INDEX_DTYPE)
  return WrittenChunk(b"".join(written), rows, methods, skipped)


def _step(
  function: Callable[..., Result], *columns: Iterable[Any]
) -> list[Result | errors.DataError]:
  """Applies a function to each image; `columns` hold the results of earlier steps.

  The result of an image whose step fails, now or earlier, is the error.
  """
  results: list[Result | errors.DataError] = []
  for values in zip(*columns, strict=True):
    failed = [value for value in values if isinstance(value, errors.DataError)]
    try:
      results.append(failed[0] if failed else function(*values))
    except errors.DataError as error:
      results.append(error)
  return results


def write_shard(
  output_dir: str, name: str, *, written: Iterable[WrittenChunk]
) -> state.FinishedShard:
  """Writes a shard and its index; each gets its name once it is complete.

  Args:
    output_dir: Local or in a bucket.
    name: The shard's file name.
    written: The shard's chunks, in order.
  """
  methods: collections.Counter[str] = collections.Counter()
  skipped: list[dict[str, str]] = []
  indices = [np.empty(0, shard_index.INDEX_DTYPE)]
  size = checksum = 0
  with storage.new_file(storage.join(output_dir, name)) as partial:
    with open(partial, "wb") as stream:
      for chunk in written:
        stream.write(chunk.content)
        rows = chunk.rows.copy()
        rows["offset"] += np.uint64(size)
        indices.append(rows)
        size += len(chunk.content)
        checksum = google_crc32c.extend(checksum, chunk.content)
        methods += chunk.methods
        skipped += chunk.skipped
    index = shard_index.to_bytes(np.concatenate(indices))
    index_name = shard_index.index_name(name)
    storage.write_bytes(storage.join(output_dir, index_name), index)
  shard = manifest.Shard(
    name=name,
    records=sum(len(rows) for rows in indices),
    bytes=size,
    crc32c=checksum,
    index_name=index_name,
    index_crc32c=storage.crc32c_of(index),
  )
  return state.FinishedShard(shard, dict(sorted(methods.items())), tuple(skipped))
