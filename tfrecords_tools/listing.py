"""Where the images lie: identities' folders, on a disk or in a bucket, tars, lists.

Each yields the images in the order of their paths; what comes in another order is
sorted on disk. A path is identity/image, whatever comes before it.
"""

import fnmatch
import itertools
import os
import struct
from collections.abc import Iterator

from facedist import errors, storage
from tfrecords_tools import external_sort, lists, source, tables, tar_index

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MEMBER = struct.Struct("<IQQ")  # origin, start, length


def read(
  input_dir: str | None,
  *,
  input_list: str | None = None,
  image_list: str | None = None,
  scratch_dir: str | None = None,
) -> source.Source:
  """Returns the images of a folder, of tar files or of a list.

  Args:
    input_dir: A folder of identities' folders, local or gs://; or tar files, see
      `archives_of`; or what the lines of `input_list` start from.
    input_list: A file of paths, one a line, that end in identity/image.
    image_list: identity/image a line: the images of `input_dir` to take.
    scratch_dir: See `external_sort.sorted_by_key`.

  Raises:
    errors.DataError: As the groups are taken: something is missing, empty or
      malformed, or an image comes twice.
  """
  if input_list is not None:
    origins: list[str] = []
    groups = lists.of_paths(
      input_list, input_dir, origins=origins, scratch_dir=scratch_dir
    )
    return source.Source(input_list, groups, origins)
  if input_dir is None:
    raise errors.UsageError("--input_dir or --input_list is required.")
  if archives := archives_of(input_dir):
    groups = in_archives(archives, scratch_dir=scratch_dir)
    if image_list:
      groups = lists.only_listed(groups, image_list, scratch_dir=scratch_dir)
    return source.Source(input_dir, groups, archives)
  folder = input_dir.rstrip("/") or "/"
  if image_list:
    groups = lists.of_images(folder, image_list, scratch_dir=scratch_dir)
  else:
    groups = in_bucket(folder) if storage.is_bucket(folder) else in_folder(folder)
  return source.Source(folder, groups, [folder])


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
    matching = fnmatch.filter(storage.list_names(folder or "."), pattern)
    if not matching:
      raise errors.DataError(f"--input_dir={name} does not exist; check the path.")
    found += [storage.join(folder, one) for one in matching]
  return found


def in_folder(folder: str) -> Iterator[source.Group]:
  """Yields the images of a local folder of identities' folders.

  Raises:
    errors.DataError: There is no such folder, or no image in it.
  """
  lists.check_folder(folder)
  with os.scandir(folder) as entries:
    identities = [entry.name for entry in entries if entry.is_dir()]
  is_empty = True
  for identity in sorted(identities, key="{}/".format):
    with os.scandir(os.path.join(folder, identity)) as entries:
      names = [entry.name for entry in entries if tables.is_image_name(entry.name)]
    if names:
      is_empty = False
      paths = [f"{identity}/{name}" for name in sorted(names)]
      yield source.new_group(identity, paths)
  if is_empty:
    raise _no_images(folder)


def in_bucket(folder: str) -> Iterator[source.Group]:
  """Yields the images of a bucket's folder of identities' folders.

  A bucket lists a thousand objects a request, in every task that plans: list tens of
  millions once, and give the file as --input_list.

  Raises:
    errors.DataError: There is no image in it.
  """
  paths = (entry.path for entry in storage.walk(folder) if _is_image(entry.path))
  is_empty = True
  for identity, group in itertools.groupby(paths, key=source.identity_of):
    is_empty = False
    yield source.new_group(identity, list(group))
  if is_empty:
    raise _no_images(folder)


def in_archives(
  archives: list[str], *, scratch_dir: str | None = None
) -> Iterator[source.Group]:
  """Yields the images of tar files; see `tar_index` for what these may hold.

  Raises:
    errors.DataError: One is no tar file or holds what it must not; or there is no
      image, or one twice.
  """
  records = (
    (member.path.encode(), _MEMBER.pack(origin, member.start, member.length))
    for origin, archive in enumerate(archives)
    for member in tar_index.members(archive)
  )
  ordered = external_sort.sorted_by_key(records, scratch_dir=scratch_dir)
  is_empty = True
  for identity, paths, places in lists.by_identity(ordered, _MEMBER, archives):
    is_empty = False
    found, starts, lengths = zip(*places, strict=True)
    yield source.new_group(
      identity, paths, origins=found, starts=starts, lengths=lengths
    )
  if is_empty:
    raise _no_images(",".join(archives))


def _is_image(path: str) -> bool:
  """Says whether a path below the folder is identity/image."""
  identity, _, name = path.partition("/")
  return bool(identity) and "/" not in name and tables.is_image_name(name)


def _no_images(folder: str) -> errors.DataError:
  """Returns the error for a folder without images."""
  return errors.DataError(
    f"--input_dir={folder} has no images in folders; it must hold a folder for each "
    "identity, such as n000002/0001_01.jpg."
  )
