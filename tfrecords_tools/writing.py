"""Shards: chunks of images made in many processes, written in order by one."""

import collections
import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import google_crc32c
import numpy as np

from facedist import errors, storage
from facedist.data import manifest, records, shard_index
from tfrecords_tools import faces, ledger, reading, source, spill

Result = TypeVar("Result")

IMAGES_A_CHUNK = 128  # a twentieth of a second; shorter ones cost the parent more
_PROBE_BYTES = 16  # no name or number before the image starts as a JPEG does


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Some neighbouring images of a shard: a process's unit of work.

  Attributes:
    paths: identity/image.
    files: The files that they lie in.
    rows: source.ROW_DTYPE[images].
    contents: The images themselves, where they lie in no file of their own; or none.
    settings: How to make the faces.
  """

  paths: Sequence[str]
  files: list[str]
  rows: np.ndarray
  contents: list[bytes] | None
  settings: faces.FaceSettings


@dataclasses.dataclass(frozen=True)
class Written:
  """A chunk's framed records.

  Attributes:
    content: The records, one after another.
    rows: INDEX_DTYPE[records], offsets from the start of `content`.
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


def chunks_of(
  images: source.Source, planned: spill.Images, *, settings: faces.FaceSettings
) -> Iterator[Chunk]:
  """Cuts a shard's images into chunks, in order."""
  held = images.contents
  for start in range(0, len(planned.rows), IMAGES_A_CHUNK):
    rows = planned.rows[start : start + IMAGES_A_CHUNK]
    paths = planned.paths[start : start + IMAGES_A_CHUNK]
    numbers = rows["start"].tolist()
    yield Chunk(
      paths=paths,
      files=reading.files_of(rows, paths, origins=images.origins),
      rows=rows,
      contents=None if held is None else [held[number] for number in numbers],
      settings=settings,
    )


def num_chunks(num_images: int) -> int:
  """Returns how many chunks a shard of so many images is cut into."""
  return -(-num_images // IMAGES_A_CHUNK)


def make_records(chunk: Chunk) -> Written:
  """Reads, aligns and encodes a chunk's images and frames them as records.

  Each step runs over the whole chunk before the next: its code then stays in the
  processor's caches, which an image's pixels sweep out, and takes half the time.
  """
  size = chunk.settings.size
  sources = chunk.contents or reading.read_all(chunk.files, chunk.rows)
  plan_cut = functools.partial(faces.plan_cut, size=size)
  cuts = _step(plan_cut, chunk.rows["geometry"], chunk.rows["place"].tolist())
  make_face = functools.partial(faces.make_face, settings=chunk.settings)
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
    record = records.Record(jpeg, label, source.identity_of(path), path)
    payload = records.serialize(record)
    image_offset = records.HEADER_BYTES + payload.index(jpeg[:_PROBE_BYTES])
    framed = records.frame(payload)
    written.append(framed)
    index.append((offset, len(framed), image_offset, len(jpeg), label))
    methods[method] += 1
    offset += len(framed)
  rows = np.array(index, shard_index.INDEX_DTYPE)
  return Written(b"".join(written), rows, methods, skipped)


def _step(
  function: Callable[..., Result], *columns: Iterable[Any]
) -> list[Result | errors.DataError]:
  """Applies a step to each image, whose earlier results are in `columns`.

  An image whose step fails has the error for a result, and passes it on.
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
  output_dir: str, name: str, *, written: Iterable[Written]
) -> ledger.FinishedShard:
  """Writes a shard and its index; both have their names only when they are whole.

  Args:
    output_dir: Local or in a bucket.
    name: The shard's file name.
    written: The shard's chunks, in order.
  """
  methods: collections.Counter[str] = collections.Counter()
  skipped: list[dict[str, str]] = []
  indices = [np.empty(0, shard_index.INDEX_DTYPE)]
  size = checksum = 0
  with _new_file(storage.join(output_dir, name)) as partial:
    with open(partial, "wb") as stream:
      for part in written:
        stream.write(part.content)
        rows = part.rows.copy()
        rows["offset"] += np.uint64(size)
        indices.append(rows)
        size += len(part.content)
        checksum = google_crc32c.extend(checksum, part.content)
        methods += part.methods
        skipped += part.skipped
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
  return ledger.FinishedShard(shard, dict(sorted(methods.items())), tuple(skipped))


@contextlib.contextmanager
def _new_file(path: str) -> Iterator[str]:
  """Yields a local name to write to; the file is at `path` if the body succeeds."""
  if not storage.is_bucket(path):
    with storage.partial_file(path) as partial:
      yield partial
    return
  with storage.scratch(), tempfile.TemporaryDirectory(prefix="facedist-") as folder:
    local = os.path.join(folder, "shard")
    yield local
    storage.upload(local, path)
