"""The images of a folder, a bucket, tar files or a list, as groups by identity.

Groups come in the order of their paths; images found in another order are sorted on
disk. A path is identity/image, whatever comes before it. Files that are no image by
their name (`image_names`) or lie in no identity's folder are left out and counted.
"""

import collections
import fnmatch
import itertools
import os
import re
import struct
from collections.abc import Iterator, Mapping

from facedist import errors, storage
from facedist.data import image_names
from tfrecords_tools import external_sort
from tfrecords_tools.sources import base, image_list, tar

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MEMBER = struct.Struct("<IQQI")  # origin, start, length, depth
_MAX_COUNTED_FOLDERS = 10_000


def list_images(
  input_dir: str | None,
  *,
  input_list: str | None = None,
  list_labels: bool = False,
  chosen: str | None = None,
  scratch_dir: str | None = None,
) -> base.Source:
  """Returns the images of a folder, of tar files or of a list.

  Args:
    input_dir: A folder of identities' folders, local or gs://; or tar files, see
      `archives_of`; or the folder of relative paths in `input_list`.
    input_list: A file of paths, one a line (`image_list.read`).
    list_labels: Whether the identities are the labels of `input_list`.
    chosen: --image_list, identity/image a line: the images of `input_dir` to take.
    scratch_dir: See `external_sort.sorted_by_key`.

  Raises:
    errors.DataError: While the groups are iterated: something is missing, empty or
      malformed, or an image comes twice.
    errors.UsageError: There is neither `input_dir` nor `input_list`.
  """
  names = image_names.NameFilter()
  if input_list is not None:
    origins: list[str] = []
    groups = image_list.from_input_list(
      input_list,
      input_dir,
      labels_are_identities=list_labels,
      names=names,
      origins=origins,
      scratch_dir=scratch_dir,
    )
    return base.Source(input_list, groups, origins, left_out=names.left_out)
  if input_dir is None:
    raise errors.UsageError("--input_dir or --input_list is required.")
  if archives := archives_of(input_dir):
    groups = in_archives(archives, names, scratch_dir=scratch_dir)
    if chosen:
      groups = image_list.only_listed(
        groups, chosen, names=names, scratch_dir=scratch_dir
      )
    return base.Source(input_dir, groups, archives, left_out=names.left_out)
  folder = input_dir.rstrip("/") or "/"
  if chosen:
    groups = image_list.from_image_list(
      folder, chosen, names=names, scratch_dir=scratch_dir
    )
  else:
    is_bucket = storage.is_bucket(folder)
    groups = in_bucket(folder, names) if is_bucket else in_folder(folder, names)
  return base.Source(folder, groups, [folder], left_out=names.left_out)


def archives_of(input_dir: str) -> list[str]:
  """Returns the tar files that --input_dir names; an empty list if it is a folder.

  One or several with commas between them; a * in a file's name matches any text.

  Raises:
    errors.DataError: No file has such a name.
  """
  names = input_dir.split(",")
  if not all(name.endswith(TAR_SUFFIXES) for name in names) or os.path.isdir(input_dir):
    return []
  found = []
  for name in names:
    folder, pattern = os.path.split(name)
    plain = re.sub(r"([?[])", r"[\1]", pattern)  # * is the only wildcard
    matching = fnmatch.filter(storage.list_names(folder or "."), plain)
    if not matching:
      raise errors.DataError(f"--input_dir={name} does not exist; check the path.")
    found += [storage.join(folder, one) for one in matching]
  return found


def in_folder(
  folder: str, names: image_names.NameFilter
) -> Iterator[base.IdentityGroup]:
  """Yields the images of a local folder of identities' folders.

  Deeper folders are not read.

  Raises:
    errors.DataError: There is no such folder, or no image in it.
  """
  base.check_folder(folder)
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
        if not entry.is_dir(follow_symlinks=False):  # a link would cost a request
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

  A bucket lists a thousand objects a request, in every task that plans. With tens of
  millions of images, list them once and give the file as --input_list.

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


def _is_of_identity(path: str, names: image_names.NameFilter) -> bool:
  """Says whether an image's path below the folder is identity/image."""
  depth = path.count("/")
  if depth == 1 and not path.startswith("/"):
    return True
  names.count(image_names.DEEPER if depth > 1 else image_names.MISPLACED)
  return False


def in_archives(
  archives: list[str],
  names: image_names.NameFilter,
  *,
  scratch_dir: str | None = None,
) -> Iterator[base.IdentityGroup]:
  """Yields the images of tar files; `tar` says what these may hold.

  `_Depths` finds out how deep the identities' folders lie.

  Raises:
    errors.DataError: An archive is no tar file or holds what it must not; there is no
      image, or one comes twice.
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
  for identity, paths, places in base.by_identity(kept, _MEMBER, archives):
    is_empty = False
    found, starts, lengths, _ = zip(*places, strict=True)
    yield base.new_group(identity, paths, origins=found, starts=starts, lengths=lengths)
  if is_empty:
    raise _no_images(",".join(archives), names)


class _Depths:
  """Finds the depth of the identities' folders in each archive.

  An archive may have any folders above them, and images above (a cover) and below
  (`thumbnails`). The identities' folders are at the depth with the most distinct folder
  names, counted over all archives, which mostly are parts of one tree. An archive
  without an image at that depth is counted alone. Of two depths with equal counts the
  upper one is taken.
  """

  def __init__(self) -> None:
    self._names: dict[tuple[int, int], set[str]] = collections.defaultdict(set)
    self._chosen: dict[int, int] = {}

  def add(self, origin: int, depth: int, folder: str) -> None:
    """Counts an image's folder at its depth, the number of parts of its path."""
    found = self._names[origin, depth]
    if len(found) < _MAX_COUNTED_FOLDERS:
      found.add(folder)

  def of(self, origin: int) -> int:
    """Returns the depth of identity/image in an archive, once all images were added."""
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


def _no_images(folder: str, names: image_names.NameFilter) -> errors.DataError:
  """Returns the error for a folder without images."""
  return errors.DataError(
    f"--input_dir={folder} has no images in folders{names.note()}; it must hold a "
    "folder for each identity, such as n000002/0001_01.jpg."
  )
