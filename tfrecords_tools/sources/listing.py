"""Where the images lie: identities' folders, on a disk or in a bucket, tars, lists.

Each yields the images in the order of their paths; what comes in another order is
sorted on disk. A path is identity/image, whatever comes before it. What is no image by
its name (`image_names`), or lies in no identity's folder, is left out and counted.

Lines of a list of images: a path alone, or with a label, an index or a header.

Lists of images: which of a folder's to take, or where all of them lie.
"""

import collections
import dataclasses
import fnmatch
import itertools
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from facedist import errors, storage
from facedist.data import image_names
from tfrecords_tools import external_sort
from tfrecords_tools.sources import base, tables, tar

_DECIDING_LINES = 1000
_PATH_COLUMNS = frozenset(
  (
    *("path", "paths", "file", "files", "filename", "filenames", "file_name"),
    *("filepath", "file_path", "image", "images", "image_path", "imagepath", "img"),
    *("img_path", "image_name", "image_file", "imagename", "name_id"),
  )
)
_LABEL_COLUMNS = frozenset(
  (
    *("label", "labels", "identity", "identity_id", "class", "class_id", "target"),
    *("person", "person_id", "subject", "subject_id"),
  )
)
_ENDINGS = "|".join(map(re.escape, image_names.ENDINGS))
_LABELLED = re.compile(
  rf"(?P<path>.*?(?:{_ENDINGS}))\"?[ ]*(?P<separator>[\t, ])\s*\S", re.IGNORECASE
)
_WHOLE_NUMBER = re.compile(r"([-+]?\d+)\.0*")  # MXNet writes 12 as 12.000000
_MXNET = re.compile(r"\d+\t(?:[-+.\deE]+\t)+(?P<path>[^\t]+)")
_PLAIN, _INDEXED = "path", "index<TAB>label<TAB>path"


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of a list.

  Attributes:
    path: The image that it names.
    label: Its one label; None if it has none, or several.
    place: The list, the line's number and the line, for errors.
  """

  path: str
  label: str | None
  place: str


@dataclasses.dataclass(frozen=True)
class _Header:
  """The columns that a list's first line names."""

  separator: str | None  # None is any number of blanks
  before: int  # columns before the path's
  after: int
  label: int | None  # its column, from the end where it is after the path's

  def split(self, text: str) -> tuple[str, str | None] | None:
    """Returns a line's path, which may hold the separator, and its label.

    None if columns lack.
    """
    fields = text.split(self.separator, self.before)
    if len(fields) <= self.before:
      return None
    fields[-1:] = fields[-1].rsplit(self.separator, self.after)
    if len(fields) <= self.before + self.after:
      return None
    label = None if self.label is None else _cleaned(fields[self.label])
    return fields[self.before].strip().strip('"'), label


def read(path: str) -> Iterator[Line]:
  """Yields the lines of a list without its header.

  The first line with an image in it decides whether lines hold a path alone,
  `path label`, `path<TAB>label`, `path,label` or MXNet's index<TAB>label<TAB>path.

  Raises:
    errors.DataError: A line is of another kind than those before it.
  """
  lines = tables.numbered_lines(path, escape=True)
  first = list(itertools.islice(lines, _DECIDING_LINES))
  header = _header_of(first[0][1]) if first else None
  rows = first if header is None else first[1:]
  kind = next(filter(None, (_kind_of(text) for _, text in rows)), _PLAIN)
  for number, text in itertools.chain(rows, lines):
    place = f"{path}, line {number}: {tables.shortened(text)!r}"
    if header is not None:
      found = header.split(text)
      if found is None:
        raise errors.DataError(f"{place} lacks a column that the first line names.")
      yield Line(*found, place)
      continue
    other = _kind_of(text)
    if other is not None and other != kind:
      raise errors.DataError(
        f"{place} reads as {other!r}, but the lines before it as {kind!r}; write all "
        "lines of a list alike."
      )
    yield Line(_path_of(text, kind), _label_in_columns(text, kind), place)


def _header_of(text: str) -> _Header | None:
  """Returns the columns that a first line names; None if it is no header."""
  if "/" in text:
    return None
  separator = next((one for one in ("\t", ",") if one in text), None)
  columns = [column.strip().strip('"').lower() for column in text.split(separator)]
  for place, column in enumerate(columns):
    if column in _PATH_COLUMNS:
      after = len(columns) - place - 1
      labels = [at for at, column in enumerate(columns) if column in _LABEL_COLUMNS]
      label = labels[0] if len(labels) == 1 else None
      if label is not None and label > place:
        label -= len(columns)
      return _Header(separator, place, after, label)
  return None


def _kind_of(text: str) -> str | None:
  """Returns what a line that names an image holds; None if it names none."""
  if image_names.has_image_ending(text.strip('"')):
    return _INDEXED if _MXNET.fullmatch(text) else _PLAIN
  if found := _LABELLED.match(text):
    return {"\t": "path<TAB>label", ",": "path,label", " ": "path label"}[
      found["separator"]
    ]
  return None


def _path_of(text: str, kind: str) -> str:
  """Returns the path in a line of a kind."""
  if kind == _PLAIN:
    return text
  if kind == _INDEXED:
    return text.rpartition("\t")[2]
  if found := _LABELLED.match(text):
    return found["path"].strip('"')
  separator = {"path<TAB>label": "\t", "path,label": ","}.get(kind)
  return text.rsplit(separator, 1)[0].strip('"')


def _label_in_columns(text: str, kind: str) -> str | None:
  """Returns the one label in a line of a kind; None if it has none, or several."""
  if kind == _INDEXED:
    _, *labels = text.split("\t")[:-1]
  elif found := _LABELLED.match(text):
    separator = found["separator"].strip(" ") or None  # None is any number of blanks
    labels = text[found.end("separator") :].split(separator)
  else:
    return None
  return _cleaned(labels[0]) if len(labels) == 1 else None


def _cleaned(label: str) -> str | None:
  """Returns a label without quotes, and 12 for 12.0; None if nothing is left."""
  label = label.strip().strip('"').strip()
  whole = _WHOLE_NUMBER.fullmatch(label)
  return (whole[1] if whole else label) or None


_ORIGIN = struct.Struct("<I")
_CHECKED_LINES = 1000  # more would take long on a network's disk, in every task


def of_paths(
  input_list: str,
  input_dir: str | None,
  *,
  by_label: bool = False,
  names: image_names.NameFilter,
  origins: list[str],
  scratch_dir: str | None = None,
  most_checked: int = _CHECKED_LINES,
) -> Iterator[base.IdentityGroup]:
  """Yields the images that a list of paths names.

  Args:
    input_list: One path a line, see `list_lines`; ends in identity/image.
    input_dir: What a path starts from that is not absolute and not gs://.
    by_label: Whether a line's label is the identity. Images are then called
      label/path, and need no folder.
    names: Says which lines are taken, and counts the others.
    origins: Gets the folders that hold identities' folders.
    scratch_dir: See `external_sort.sorted_by_key`.
    most_checked: Images on a disk that must be there, from the first on.

  Raises:
    errors.DataError: A line is no such path or names no file, or an image comes twice.
  """
  number_of: dict[str, int] = {}

  def records() -> Iterator[external_sort.Record]:
    unchecked = most_checked
    for line in read(input_list):
      split = _split_whole if by_label else _split
      folder, path = split(line, input_dir)
      if not names.takes(_below(line.path, input_dir)):
        continue
      if unchecked and not storage.is_bucket(folder):
        unchecked -= 1
        place = os.path.join(folder, path)
        if not os.path.exists(image_names.on_disk(place)):
          raise errors.DataError(
            f"{line.place} names {place}, which does not exist; correct the list or "
            "--input_dir."
          )
      if folder not in number_of:
        number_of[folder] = len(origins)
        origins.append(folder)
      if by_label:
        path = f"{_label_of(line)}/{path}"
      yield path.encode(), _ORIGIN.pack(number_of[folder])

  ordered = external_sort.sorted_by_key(records(), scratch_dir=scratch_dir)
  is_empty = True
  for identity, paths, places in by_identity(ordered, _ORIGIN, origins):
    is_empty = False
    yield base.new_group(
      identity,
      paths,
      origins=[place for (place,) in places],
      starts=len(identity) + 1 if by_label else 0,
    )
  if is_empty:
    raise errors.DataError(f"{input_list} lists no image{names.note()}.")


def of_images(
  folder: str,
  image_list: str,
  *,
  names: image_names.NameFilter,
  scratch_dir: str | None = None,
) -> Iterator[base.IdentityGroup]:
  """Yields the images of a folder that a list names, identity/image a line.

  Raises:
    errors.DataError: The folder or the list is missing, empty or malformed.
  """
  is_local = not storage.is_bucket(folder)
  if is_local:
    check_folder(folder)
  for identity, paths in listed(image_list, names=names, scratch_dir=scratch_dir):
    place = os.path.join(folder, identity)
    if is_local and not os.path.isdir(image_names.on_disk(place)):
      raise errors.DataError(
        f"{image_list} lists images of {identity}, which is not in {folder}; say "
        f"--image_list={tables.NONE} to take what the folder holds."
      )
    yield base.new_group(identity, paths)


def only_listed(
  groups: Iterable[base.IdentityGroup],
  image_list: str,
  *,
  names: image_names.NameFilter,
  scratch_dir: str | None = None,
) -> Iterator[base.IdentityGroup]:
  """Passes on the images that a list names, identity/image a line.

  Raises:
    errors.DataError: The list is malformed or names an image that is not there.
  """
  wanted = listed(image_list, names=names, scratch_dir=scratch_dir)
  identity, paths = next(wanted, (None, []))
  for group in groups:
    if identity != group.identity:
      continue
    places = {path: place for place, path in enumerate(group.paths)}
    absent = [path for path in paths if path not in places]
    if absent:
      break
    yield group.take(np.array([places[path] for path in paths]))
    identity, paths = next(wanted, (None, []))
  else:
    absent = paths
  if absent:
    raise errors.DataError(
      f"{image_list} lists {absent[0]}, which is not in the archive; say "
      f"--image_list={tables.NONE} to take what it holds."
    )


def check_folder(folder: str) -> None:
  """Raises DataError unless it is a local folder."""
  if not os.path.isdir(folder):
    raise errors.DataError(f"--input_dir={folder} is no folder; check the path.")


def by_identity(
  records: Iterable[external_sort.Record],
  numbers: struct.Struct,
  origins: Sequence[str],
) -> Iterator[tuple[str, list[str], list[tuple[Any, ...]]]]:
  """Yields identity, paths and each path's numbers of records sorted by path.

  Args:
    records: Path, and its numbers as packed; the first is of its origin.
    numbers: How they are packed.
    origins: For the error.

  Raises:
    errors.DataError: A path comes twice.
  """
  before, place_before = "", (0,)

  def unpacked() -> Iterator[tuple[str, tuple[Any, ...]]]:
    nonlocal before, place_before
    for encoded, packed in records:
      path, place = encoded.decode(), numbers.unpack(packed)
      if path == before:
        raise errors.DataError(
          f"{path} comes twice, in {origins[place_before[0]]} and in "
          f"{origins[place[0]]}; keep one, or rename an identity."
        )
      before, place_before = path, place
      yield path, place

  for identity, group in itertools.groupby(
    unpacked(), key=lambda found: base.identity_of(found[0])
  ):
    paths, places = zip(*group, strict=True)
    yield identity, list(paths), list(places)


def listed(
  image_list: str,
  *,
  names: image_names.NameFilter,
  scratch_dir: str | None = None,
) -> Iterator[tuple[str, list[str]]]:
  """Yields each identity of a list with the sorted paths of its images.

  Raises:
    errors.DataError: A line is no identity/image or comes twice, or there is none.
  """
  records = (
    (_checked(line).encode(), _ORIGIN.pack(0))
    for line in read(image_list)
    if names.takes(line.path)
  )
  ordered = external_sort.sorted_by_key(records, scratch_dir=scratch_dir)
  is_empty = True
  for identity, paths, _ in by_identity(ordered, _ORIGIN, [image_list]):
    is_empty = False
    yield identity, paths
  if is_empty:
    raise errors.DataError(f"{image_list} lists no image{names.note()}.")


def _checked(line: Line) -> str:
  """Returns a line's path; DataError if it is not identity/image."""
  parts = line.path.split("/")
  if len(parts) != 2 or not all(parts) or ".." in parts:
    raise errors.DataError(f"{line.place} is not identity/image.")
  return line.path


def _below(line: str, input_dir: str | None) -> str:
  """Returns the part of a listed path that tells whether it is to be left out.

  What lies above --input_dir does not: that may be hidden.
  """
  above = "" if input_dir is None else f"{input_dir.rstrip('/')}/"
  below = line.removeprefix(above).removeprefix(storage.BUCKET_PREFIX)
  return "/".join(part for part in below.split("/") if part not in ("", "."))


def _label_of(line: Line) -> str:
  """Returns a line's label; DataError if it has none that can be an identity."""
  if line.label is None:
    raise errors.DataError(
      f"{line.place} has no label, or several, for --list_labels; write "
      "path<TAB>label, path,label, path label (one word), index<TAB>label<TAB>path, or "
      "a first line that names the columns, one of them label."
    )
  if "/" in line.label or line.label in (".", ".."):
    raise errors.DataError(
      f"{line.place} has the label {line.label!r}, but an identity's name has no '/' "
      "and is not '.' or '..'; rename it."
    )
  return line.label


def _split_whole(line: Line, input_dir: str | None) -> tuple[str, str]:
  """Returns --input_dir and the path below it; what `_split` does for others."""
  below = _below(line.path, input_dir)
  above = None if input_dir is None else input_dir.rstrip("/")
  is_below = not line.path.startswith(("/", storage.BUCKET_PREFIX)) or (
    above is not None and line.path.startswith(f"{above}/")
  )
  if above is None or not is_below or not below or ".." in line.path.split("/"):
    return _split(line, input_dir)
  return above or "/", below


def _split(line: Line, input_dir: str | None) -> tuple[str, str]:
  """Returns the folder of a listed path, and identity/image in it."""
  is_absolute = line.path.startswith(("/", storage.BUCKET_PREFIX))
  if not is_absolute and input_dir is None:
    raise errors.DataError(f"{line.place} is relative; say from which --input_dir.")
  path = line.path
  if not is_absolute and input_dir is not None:
    path = storage.join(input_dir, path)
  folder, *image = path.rsplit("/", 2)
  is_in_bucket = storage.is_bucket(path)
  is_whole = (
    len(image) == 2 and all(image) and storage.is_bucket(folder) == is_in_bucket
  )
  if not is_whole or ".." in line.path.split("/"):
    raise errors.DataError(f"{line.place} does not end in identity/image.")
  return folder or "/", "/".join(image)


TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MEMBER = struct.Struct("<IQQI")  # origin, start, length, depth
_MAX_COUNTED_FOLDERS = 10_000


def list_images(
  input_dir: str | None,
  *,
  input_list: str | None = None,
  list_labels: bool = False,
  image_list: str | None = None,
  scratch_dir: str | None = None,
) -> base.Source:
  """Returns the images of a folder, of tar files or of a list.

  Args:
    input_dir: A folder of identities' folders, local or gs://; or tar files, see
      `archives_of`; or what the lines of `input_list` start from.
    input_list: A file of paths, one a line (`list_lines`), that end in identity/image.
    list_labels: Whether the identities are the labels of `input_list`.
    image_list: identity/image a line: the images of `input_dir` to take.
    scratch_dir: See `external_sort.sorted_by_key`.

  Raises:
    errors.DataError: As the groups are taken: something is missing, empty or
      malformed, or an image comes twice.
  """
  names = image_names.NameFilter()
  if input_list is not None:
    origins: list[str] = []
    groups = of_paths(
      input_list,
      input_dir,
      by_label=list_labels,
      names=names,
      origins=origins,
      scratch_dir=scratch_dir,
    )
    return base.Source(input_list, groups, origins, left_out=names.left_out)
  if input_dir is None:
    raise errors.UsageError("--input_dir or --input_list is required.")
  if archives := archives_of(input_dir):
    groups = in_archives(archives, names, scratch_dir=scratch_dir)
    if image_list:
      groups = only_listed(groups, image_list, names=names, scratch_dir=scratch_dir)
    return base.Source(input_dir, groups, archives, left_out=names.left_out)
  folder = input_dir.rstrip("/") or "/"
  if image_list:
    groups = of_images(folder, image_list, names=names, scratch_dir=scratch_dir)
  else:
    is_bucket = storage.is_bucket(folder)
    groups = in_bucket(folder, names) if is_bucket else in_folder(folder, names)
  return base.Source(folder, groups, [folder], left_out=names.left_out)


def archives_of(input_dir: str) -> list[str]:
  """Returns the tar files that --input_dir names; none if it is a folder.

  One or several with commas between them; a * in a file's name stands for anything.

  Raises:
    errors.DataError: No file has such a name.
  """
  names = input_dir.split(",")
  if not all(name.endswith(TAR_SUFFIXES) for name in names) or os.path.isdir(input_dir):
    return []
  found = []
  for name in names:
    folder, pattern = os.path.split(name)
    plain = re.sub(r"([?[])", r"[\1]", pattern)  # of a pattern's signs * alone is one
    matching = fnmatch.filter(storage.list_names(folder or "."), plain)
    if not matching:
      raise errors.DataError(f"--input_dir={name} does not exist; check the path.")
    found += [storage.join(folder, one) for one in matching]
  return found


def in_folder(
  folder: str, names: image_names.NameFilter
) -> Iterator[base.IdentityGroup]:
  """Yields the images of a local folder of identities' folders.

  Folders within those are not looked into.

  Raises:
    errors.DataError: There is no such folder, or no image in it.
  """
  check_folder(folder)
  identities = []
  with storage.readable(folder), os.scandir(folder) as entries:
    for entry in entries:
      if entry.is_dir():
        if names.takes_folder(image_names.escaped(entry.name)):
          identities.append(image_names.escaped(entry.name))
      elif names.takes_file(image_names.escaped(entry.name)):
        names.count(image_names.MISPLACED)
  _check_are_different(identities, folder)
  is_empty = True
  for identity in sorted(identities, key="{}/".format):
    found = []
    place = image_names.on_disk(os.path.join(folder, identity))
    with storage.readable(place), os.scandir(place) as entries:
      for entry in entries:
        name = image_names.escaped(entry.name)
        if not entry.is_dir(follow_symlinks=False):  # to follow them takes a request
          if names.takes_file(name):
            found.append(name)
        elif names.takes_folder(f"{identity}/{name}"):
          names.count(image_names.DEEPER)
    _check_are_different(found, place)
    if found:
      is_empty = False
      paths = [f"{identity}/{name}" for name in sorted(found)]
      yield base.new_group(identity, paths)
  if is_empty:
    raise _no_images(folder, names)


def _check_are_different(names: list[str], folder: str) -> None:
  """Raises DataError where two names are the same once their bytes are escaped."""
  if len(set(names)) < len(names):
    twice = collections.Counter(names).most_common(1)[0][0]
    raise errors.DataError(
      f"{folder} has two entries that are written {twice!r}, one of them not in UTF-8; "
      "rename one."
    )


def in_bucket(
  folder: str, names: image_names.NameFilter
) -> Iterator[base.IdentityGroup]:
  """Yields the images of a bucket's folder of identities' folders.

  A bucket lists a thousand objects a request, in every task that plans: list tens of
  millions once, and give the file as --input_list.

  Raises:
    errors.DataError: There is no image in it.
  """
  found = (entry.path for entry in storage.walk(folder) if names.takes(entry.path))
  paths = (path for path in found if _is_of_identity(path, names))
  is_empty = True
  for identity, group in itertools.groupby(paths, key=base.identity_of):
    is_empty = False
    yield base.new_group(identity, list(group))
  if is_empty:
    raise _no_images(folder, names)


def in_archives(
  archives: list[str],
  names: image_names.NameFilter,
  *,
  scratch_dir: str | None = None,
) -> Iterator[base.IdentityGroup]:
  """Yields the images of tar files; see `tar_index` for what these may hold.

  How deep the identities' folders lie is not known before: see `_Depths`.

  Raises:
    errors.DataError: One is no tar file or holds what it must not; or there is no
      image, or one twice.
  """
  depths = _Depths()

  def records() -> Iterator[external_sort.Record]:
    for origin, archive in enumerate(archives):
      for member in tar.members(archive, names):
        parts = member.path.split("/")
        depth = len(parts)
        if depth > 1:
          depths.add(origin, depth, parts[-2])
          place = _MEMBER.pack(origin, member.start, member.length, depth)
          yield "/".join(parts[-2:]).encode(), place
        else:
          names.count(image_names.MISPLACED)

  def is_of_identity(record: external_sort.Record) -> bool:
    origin, _, _, depth = _MEMBER.unpack(record[1])
    if depth == depths.of(origin):
      return True
    is_deeper = depth > depths.of(origin)
    names.count(image_names.DEEPER if is_deeper else image_names.MISPLACED)
    return False

  # The sort takes all records before it yields one, so the depths are known by then.
  ordered = external_sort.sorted_by_key(records(), scratch_dir=scratch_dir)
  kept = filter(is_of_identity, ordered)
  is_empty = True
  for identity, paths, places in by_identity(kept, _MEMBER, archives):
    is_empty = False
    found, starts, lengths, _ = zip(*places, strict=True)
    yield base.new_group(identity, paths, origins=found, starts=starts, lengths=lengths)
  if is_empty:
    raise _no_images(",".join(archives), names)


class _Depths:
  """At which depth of each archive the identities' folders lie.

  An archive may have any folders above them, and there may be images above (a cover)
  and below (`thumbnails`). The identities' folders are those that have the most names:
  in all archives together, as these are mostly parts of one tree; in an archive that
  has no image there, in it alone. Of two depths with as many, it is the upper one.
  """

  def __init__(self) -> None:
    self._names: dict[tuple[int, int], set[str]] = collections.defaultdict(set)
    self._chosen: dict[int, int] = {}

  def add(self, origin: int, depth: int, folder: str) -> None:
    """Notes an image's folder and depth, the parts of its path, in an archive."""
    found = self._names[origin, depth]
    if len(found) < _MAX_COUNTED_FOLDERS:
      found.add(folder)

  def of(self, origin: int) -> int:
    """Returns the depth of identity/image in an archive, once all were noted."""
    if origin not in self._chosen:
      everywhere: collections.Counter[int] = collections.Counter()
      alone: collections.Counter[int] = collections.Counter()
      for (one, depth), found in self._names.items():
        everywhere[depth] += len(found)
        if one == origin:
          alone[depth] = len(found)
      chosen = _upper_of_most(everywhere)
      self._chosen[origin] = chosen if chosen in alone else _upper_of_most(alone)
    return self._chosen[origin]


def _upper_of_most(counts: Mapping[int, int]) -> int:
  """Returns the smallest depth of those with the largest count."""
  return min(counts, key=lambda depth: (-counts[depth], depth))


def _is_of_identity(path: str, names: image_names.NameFilter) -> bool:
  """Says whether an image's path below the folder is identity/image."""
  depth = path.count("/")
  if depth == 1 and not path.startswith("/"):
    return True
  names.count(image_names.DEEPER if depth > 1 else image_names.MISPLACED)
  return False


def _no_images(folder: str, names: image_names.NameFilter) -> errors.DataError:
  """Returns the error for a folder without images."""
  return errors.DataError(
    f"--input_dir={folder} has no images in folders{names.note()}; it must hold a "
    "folder for each identity, such as n000002/0001_01.jpg."
  )
