"""Reads images to embed, with their names, from a folder of files or from shards.

Each source yields loaders, which `load_in_order` runs in threads. Shards in a bucket
are prefetched, and released after they are read, so the set may be larger than the
cache.
"""

import collections
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

import cv2
import numpy as np

from facedist import errors, storage
from facedist.data import decoding, image_names
from facedist.data.cache.staged_dataset import StagedSet
from facedist.data.face_detection import FaceFinder
from facedist.data.image_names import NameFilter
from facedist.data.readers import local_reader
from facedist.data.shards import manifest, open_files, shard_index, tfrecord


@dataclasses.dataclass(frozen=True)
class Face:
  """An image that was read.

  Attributes:
    path: Its path below the input folder, with forward slashes.
    identity: The identity's name; None if it is not known.
    image: uint8[S, S, 3] RGB.
    fit: How the image got its size: 'kept', 'resized', 'cropped' to the largest square
      in its middle and resized, or 'aligned' by the landmarks of its face.
  """

  path: str
  identity: str | None
  image: np.ndarray
  fit: str = "kept"


@dataclasses.dataclass(frozen=True)
class Unreadable:
  """An image that could not be read, and why."""

  path: str
  reason: str


Loader = Callable[[], Face | Unreadable]
"""Reads and decodes one image, in any thread."""


def image_paths(folder: str, names: NameFilter) -> Iterator[str]:
  """Yields the paths of all images below a folder, sorted part by part.

  Those of a bucket are sorted by bytes, as the bucket lists them. The names of one
  branch of folders are in memory at a time. Links are followed, except to a folder
  above them.

  Args:
    folder: Local or in a bucket.
    names: Selects files and folders, and counts the others.

  Yields:
    Paths below `folder`, with forward slashes.
  """
  if not storage.is_bucket(folder):
    yield from _walk(folder, "", names=names, above=())
    return
  for entry in storage.walk(folder):
    if names.takes(entry.path):
      yield entry.path


def folder_loaders(
  folder: str, *, image_size: int, finder: FaceFinder | None = None
) -> Iterator[Loader]:
  """Yields a loader for each image below a folder; its parent folder is its identity.

  An image that lies in `folder` itself has no identity.

  Args:
    folder: Local or in a bucket.
    image_size: Height and width of the images that are returned, in pixels.
    finder: Finds the faces, which are then aligned; an image without one counts as
      unreadable. None takes the largest square in the middle, see `_fitted`.
  """
  for path in image_paths(folder, NameFilter()):
    yield functools.partial(
      _load_file,
      storage.join(folder, path),
      path,
      _folder_of(path),
      image_size=image_size,
      finder=finder,
    )


def listed_images(path: str) -> Iterator[tuple[str, str | None]]:
  """Yields path and identity of each line of a list; empty lines are left out.

  Args:
    path: A text file, local or in a bucket. A line is PATH or PATH<TAB>IDENTITY; the
      identity is the name of the image's folder if not given.

  Raises:
    errors.DataError: A line has no path, or more than one tab.
  """
  for number, line in enumerate(storage.open_lines(path, escape=True), 1):
    if not line.strip():
      continue
    image, *labels = line.split("\t")
    if not image.strip() or len(labels) > 1:
      raise errors.DataError(
        f"{path}, line {number}, is {line!r:.100}; write PATH, or PATH, a tab and the "
        "identity."
      )
    yield image, (labels[0].strip() or None) if labels else _folder_of(image)


def list_loaders(
  path: str, *, image_size: int, finder: FaceFinder | None = None
) -> Iterator[Loader]:
  """Yields a loader for each image of a list, see `listed_images`.

  A path that is not absolute is relative to the list's folder. The other arguments are
  those of `folder_loaders`.
  """
  folder = os.path.dirname(path)
  for image, identity in listed_images(path):
    place = image if storage.is_bucket(image) else storage.join(folder, image)
    yield functools.partial(
      _load_file, place, image, identity, image_size=image_size, finder=finder
    )


def load_in_order(
  loaders: Iterable[Loader], *, num_threads: int, ahead: int
) -> Iterator[Face | Unreadable]:
  """Yields what the loaders return, in their order, read in threads.

  Args:
    loaders: Consumed as needed.
    num_threads: Images read at the same time.
    ahead: Images read in advance; bounds the memory.
  """
  iterator = iter(loaders)
  with futures.ThreadPoolExecutor(num_threads) as pool:
    pending = collections.deque(
      pool.submit(loader) for loader in itertools.islice(iterator, ahead)
    )
    try:
      while pending:
        loaded = pending.popleft().result()
        pending.extend(pool.submit(loader) for loader in itertools.islice(iterator, 1))
        yield loaded
    finally:
      for waiting in pending:
        waiting.cancel()


def batches(
  loaded: Iterator[Face | Unreadable], size: int
) -> Iterator[list[Face | Unreadable]]:
  """Yields lists of `size` images, the last one shorter."""
  while batch := list(itertools.islice(loaded, size)):
    yield batch


def decode(content: bytes, *, image_size: int) -> np.ndarray:
  """Decodes an image and fits it to the network's size, as `_fitted` does.

  Returns:
    uint8[image_size, image_size, 3] RGB.

  Raises:
    errors.DataError: It is not an image, or it is cut off.
  """
  return _fitted(decoding.decode(content), image_size=image_size)[0]


def _fitted(pixels: np.ndarray, *, image_size: int) -> tuple[np.ndarray, str]:
  """Crops and resizes uint8[height, width, 3] BGR pixels to the network's size.

  The largest square in the middle of the upright image is resized: by area where it
  shrinks, linearly where it grows. An aligned crop of the right size stays as it is.

  Returns:
    uint8[image_size, image_size, 3] RGB, and how it got its size, see `Face.fit`.
  """
  height, width = pixels.shape[:2]
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  square = pixels[top : top + side, left : left + side]
  if side != image_size:
    method = cv2.INTER_AREA if side > image_size else cv2.INTER_LINEAR
    square = cv2.resize(square, (image_size, image_size), interpolation=method)
  fit = "cropped" if height != width else "kept" if side == image_size else "resized"
  return cv2.cvtColor(square, cv2.COLOR_BGR2RGB), fit


def _walk(
  folder: str, below: str, *, names: NameFilter, above: tuple[tuple[int, int], ...]
) -> Iterator[str]:
  """Yields image paths below `folder`, each with `below` before it."""
  with storage.readable(folder):
    status = os.stat(folder)
  place = (status.st_dev, status.st_ino)
  if place in above:
    return
  with storage.readable(folder), os.scandir(folder) as entries:
    found = sorted(
      (image_names.escaped(entry.name), entry.is_dir()) for entry in entries
    )
  for name, is_folder in found:
    if not is_folder:
      if names.takes_file(name):
        yield below + name
    elif names.takes_folder(below + name):
      inner = image_names.on_disk(os.path.join(folder, name))
      yield from _walk(inner, f"{below}{name}/", names=names, above=(*above, place))


def _folder_of(path: str) -> str | None:
  """Returns the name of an image's folder, which is its identity; None without one."""
  return os.path.basename(os.path.dirname(path)) or None


def _load_file(
  place: str,
  path: str,
  identity: str | None,
  *,
  image_size: int,
  finder: FaceFinder | None,
) -> Face | Unreadable:
  """Reads one image file."""
  try:
    if storage.is_bucket(place):
      content = storage.read_bytes(place)
    else:  # opened here for the system's own short reason if it cannot be read
      with open(image_names.on_disk(place), "rb") as stream:
        content = stream.read()
    pixels = decoding.decode(content)
    if finder is None:
      image, fit = _fitted(pixels, image_size=image_size)
    else:
      pixels, _ = finder.aligned(pixels, size=image_size)
      image, fit = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), "aligned"
    return Face(path, identity, image, fit)
  except OSError as error:
    return Unreadable(path, error.strerror or str(error))
  except errors.DataError as error:
    return Unreadable(path, str(error))


@dataclasses.dataclass(frozen=True)
class _Shard:
  """A shard that stays open while a loader needs it."""

  number: int
  file: open_files.OpenFile
  files: open_files.ShardFiles

  @property
  def path(self) -> str:
    """Its path at its source."""
    return self.files.path(self.number)


def loaders(
  data: StagedSet, split: str, *, image_size: int, records: range | None = None
) -> Iterator[Loader]:
  """Yields a loader for each record of a split, with the file name in the record.

  A record without one gets its shard and number there, as in `NAME.tfrecord/7`. The
  identity is the manifest's for the record's label, because a selection may rename it.

  Args:
    data: The set.
    split: One of its splits.
    image_size: Height and width of its images in pixels.
    records: Numbers of the records; None for all. No other shards are fetched.

  Raises:
    errors.DataError: There is no such split, or a shard or its index is missing or not
      the manifest's; where the set is local, before the first is yielded.
  """
  content = manifest.load(data.folder)
  load = functools.partial(
    shard_index.open_index, data.folder, num_identities=content.num_identities
  )
  part = content.split(split, data.folder)
  shards = part.shards
  if records is None:
    records = range(part.records)
  copies = data.files(split)
  files = copies or local_reader.LocalFiles(data.folder, shards)
  if copies is None:
    for described in shards:
      load(described)
    for number in range(len(shards)):
      files.get(number)
  data.follow_shards(split, records)
  end = 0
  for number, described in enumerate(shards):
    first, end = end, end + described.records
    if end <= records.start or first >= records.stop:
      continue
    shard = _Shard(number, files.get(number), files)
    for place, row in enumerate(load(described)):
      if first + place not in records:
        continue
      data.reached(first + place)
      yield functools.partial(
        _load,
        shard,
        place,
        identity=content.identities[row["label"]],
        offset=int(row["offset"]),
        length=int(row["length"]),
        image_size=image_size,
      )
    del shard  # the next one may need its room in the cache


def _load(
  shard: _Shard,
  number: int,
  *,
  identity: str,
  offset: int,
  length: int,
  image_size: int,
) -> Face | Unreadable:
  """Reads one record of a shard; a corrupt one is named by its place in the shard.

  Raises:
    errors.DataError: The shard was replaced since it was opened.
    errors.CorruptCopyError: The shard is a corrupt copy.
  """
  try:
    content = os.pread(shard.file.descriptor, length, offset)
    record = tfrecord.parse(tfrecord.unframe(content))
    image = np.empty((image_size, image_size, 3), np.uint8)
    decoding.decode_record(record.jpeg, image)
    name = record.filename or f"{os.path.basename(shard.path)}/{number}"
    return Face(name, identity, image)
  except (OSError, errors.DataError) as error:
    shard.files.check(shard.number, shard.file)
    place = f"{os.path.basename(shard.path)}, record {number} at byte {offset}"
    return Unreadable(place, str(error))
