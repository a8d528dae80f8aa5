"""WebDataset's layout: tar files whose neighbouring members with one key are a sample.

`000017.jpg` and `000017.cls` are the sample 000017. A key is a member's path up to the
first dot of its file name; a sample's members follow one another. The image may be of
any kind that the builder reads. The label is the text of `KEY.cls`, or "label" in the
object of `KEY.json`: a number or a name.

The images stay where they lie in the tar files (see `tar`), which are not extracted.
"""

import itertools
import json
import re
import struct
from collections.abc import Iterator

from facedist import errors, storage
from facedist.data import image_names
from tfrecords_tools import external_sort
from tfrecords_tools.sources import base, listing, tar

LABEL_ENDINGS = (".cls", ".json")  # the first of them that a sample has decides
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_ARCHIVES = 1_000_000
_MAX_LETTERS = 255
_PLACE = struct.Struct("<IQQ")  # origin, first byte, length
_NO_IMAGE = "labels without an image"


def read(input_dir: str, *, scratch_dir: str | None = None) -> base.Source:
  """Returns the images, called LABEL/TAR/KEY with the image's ending.

  A label that is a number has at least seven digits, so the sorted identities are in
  the order of their numbers. TAR is the file's name without its ending: keys may be the
  same in several files.

  Args:
    input_dir: Tar files, see `archives_of`.
    scratch_dir: See `external_sort.sorted_by_key`.

  Raises:
    errors.DataError: There is no such file; or, while the groups are iterated, one is
      no tar file, or an image has no label.
  """
  archives = archives_of(input_dir)
  names = image_names.NameFilter()
  groups = _groups(input_dir, archives, names=names, scratch_dir=scratch_dir)
  return base.Source(input_dir, groups, archives, left_out=names.left_out)


def archives_of(input_dir: str) -> list[str]:
  """Returns the tar files that --input_dir names.

  One or several with commas between them, where {000..123} is a range of numbers and a
  * in a file's name matches any text; or a folder, of which every .tar file is taken.

  Raises:
    errors.DataError: There is none, or a range is too large or runs backwards.
  """
  found: list[str] = []
  for name in input_dir.split(","):
    if name.endswith(listing.TAR_SUFFIXES):
      for one in _expanded(name, flag=input_dir):
        found += listing.archives_of(one) if "*" in one else [one]
    else:
      inside = [one for one in storage.list_names(name) if one.endswith(".tar")]
      found += [storage.join(name, one) for one in inside]
  if not found:
    raise errors.DataError(
      f"--input_dir={input_dir} has no .tar file; name the files, such as "
      "train-{000000..000099}.tar."
    )
  return found


def _expanded(name: str, *, flag: str) -> list[str]:
  """Returns the names that a name with ranges of numbers stands for."""
  found = [name]
  while (matched := _RANGE.search(found[0])) is not None:
    first, last = matched.groups()
    numbers = range(int(first), int(last) + 1)
    if not 0 < len(numbers) * len(found) <= _MAX_ARCHIVES:
      raise errors.DataError(
        f"--input_dir={flag}: {matched[0]} must run from the smaller number to the "
        f"larger, and all ranges may name {_MAX_ARCHIVES:,} files."
      )
    texts = [f"{number:0{len(first)}d}" for number in numbers]
    found = [_RANGE.sub(text, one, count=1) for one in found for text in texts]
  return found


def _groups(
  input_dir: str,
  archives: list[str],
  *,
  names: image_names.NameFilter,
  scratch_dir: str | None,
) -> Iterator[base.IdentityGroup]:
  """Yields the images by identity."""

  def records() -> Iterator[external_sort.Record]:
    for origin, archive in enumerate(archives):
      stem = archive.rpartition("/")[2].removesuffix(".tar")
      for path, member in _samples(archive, names):
        label, _, image = path.partition("/")
        place = _PLACE.pack(origin, member.start, member.length)
        yield f"{label}/{stem}/{image}".encode(), place

  ordered = external_sort.sorted_by_key(records(), scratch_dir=scratch_dir)
  is_empty = True
  for identity, paths, places in base.by_identity(ordered, _PLACE, archives):
    is_empty = False
    origins, starts, lengths = zip(*places, strict=True)
    yield base.new_group(
      identity, paths, origins=origins, starts=starts, lengths=lengths
    )
  if is_empty:
    raise errors.DataError(
      f"--input_dir={input_dir} has no samples such as 000017.jpg and 000017.cls"
      f"{names.note()}."
    )


def _samples(
  archive: str, names: image_names.NameFilter
) -> Iterator[tuple[str, tar.Member]]:
  """Yields each sample's LABEL/KEY.ending and its image."""
  members = (
    member
    for member in tar.members(archive, names, sidecars=LABEL_ENDINGS)
    if not image_names.is_system(member.path.rpartition("/")[2])
  )
  for key, sample in itertools.groupby(members, key=lambda member: _key(member.path)):
    images, labels = [], {}
    for member in sample:
      if member.content is None:
        images.append(member)
      else:
        labels[f".{member.path.rpartition('.')[2].lower()}"] = member
    if not images:
      names.count(_NO_IMAGE)
      continue
    if len(images) > 1:
      raise errors.DataError(
        f"{archive}: {images[0].path} and {images[1].path} are two images of one "
        "sample; leave one out."
      )
    source = next(
      (labels[ending] for ending in LABEL_ENDINGS if ending in labels), None
    )
    if source is None:
      raise errors.DataError(
        f"{archive}: {images[0].path} has no label; put {key}.cls next to it."
      )
    label = base.name_of_label(_label_of(source, archive=archive))
    yield f"{label}/{images[0].path}", images[0]


def _key(path: str) -> str:
  """Returns a member's key: its path up to the first dot of its file's name."""
  folder, slash, name = path.rpartition("/")
  return f"{folder}{slash}{name.partition('.')[0]}"


def _label_of(member: tar.Member, *, archive: str) -> str:
  """Returns the label in a .cls or .json member."""
  place = f"{archive}: {member.path}"
  try:
    label: object = (member.content or b"").decode()
    if member.path.lower().endswith(".json"):
      found = json.loads(str(label))
      label = found.get("label") if isinstance(found, dict) else None
    is_label = isinstance(label, int | str) and not isinstance(label, bool)
    text = str(label).strip() if is_label else ""
  except (ValueError, RecursionError) as error:
    raise errors.DataError(f"{place} is no label ({error}).") from error
  is_name = text.isprintable() and 0 < len(text) <= _MAX_LETTERS
  if not is_name or "/" in text or text in (".", ".."):
    raise errors.DataError(
      f"{place} has the label {text[:40]!r}; it must be a number or a name in one "
      f'line, of at most {_MAX_LETTERS} letters, without /; in JSON as {{"label": …}}.'
    )
  return text
