"""InsightFace's verification sets: a pickle of (images, whether each pair is of one).

A pickle may run any code when it is read. This reader runs none: it knows lists,
numbers and bytes, and takes what NumPy's arrays leave in a pickle as plain data.
"""

import io
import os
import pickle
import pickletools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from facedist import errors, storage
from tfrecords_tools.sources import base, tables

NUM_FOLDS = 10
_ENDING = ".bin"
_NUMBERS = frozenset(
  ("b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)))
)
_NUMBERS |= {"f2", "f4", "f8"}
_MOST_MEMO = 1 << 22  # a pickle that names a larger place asks for that much memory


def read(path: str) -> base.Source:
  """Reads a set; pair i is of the images 2 i and 2 i + 1.

  Who is who is not in the file, so the two images of a 'same' pair are an identity,
  and each image of another pair is one. Folds are ten runs of pairs, as InsightFace
  and scikit-learn's KFold cut them.

  Raises:
    errors.DataError: The file is missing or not such a set.
  """
  images, same = parse(storage.read_bytes(path), origin=path)
  pairs = np.empty((len(same), 4), np.int32)
  pairs[:, 0] = np.arange(0, len(images), 2)
  pairs[:, 1] = pairs[:, 0] + 1
  pairs[:, 2] = same
  num_folds = min(NUM_FOLDS, len(same))
  for fold, rows in enumerate(np.array_split(np.arange(len(same)), num_folds)):
    pairs[rows, 3] = fold

  def explain_broken(image: str, reason: str) -> str:
    index = int(tables.without_suffix(image).rpartition("/")[2])
    return (
      f"{path}: image {index}, of pair {index // 2} (both count from 0): {reason}; a "
      "verification set needs every image of its pairs: download the file again, "
      "delete what was built of it, and start again."
    )

  return base.Source(
    path,
    _groups(same),
    [path],
    pairs=pairs,
    num_folds=num_folds,
    contents=images,
    explain_broken=explain_broken,
  )


def files_of(input_dir: str) -> list[str]:
  """Returns the files that --input_dir names.

  One or several with commas between them, or folders, of which every file that ends in
  .bin counts but hidden ones.

  Raises:
    errors.DataError: One of several does not exist, or a folder has no such file.
  """
  is_one = "," not in input_dir or os.path.exists(input_dir)
  names = [input_dir] if is_one else input_dir.split(",")
  found = []
  for name in names:
    if _is_folder(name):
      inside = [one for one in storage.list_names(name) if _is_set(one)]
      if not inside:
        raise errors.DataError(
          f"--input_dir={name} has no file that ends in {_ENDING}; name the files."
        )
      found += [storage.join(name, one) for one in inside]
    else:
      if not is_one:
        storage.status(name)
      found.append(name)
  return found


def _is_folder(path: str) -> bool:
  """Says whether a path is a folder; a bucket has one where no file is."""
  if storage.is_bucket(path):
    return not path.lower().endswith(_ENDING) and not storage.exists(path)
  return os.path.isdir(path)


def _is_set(name: str) -> bool:
  """Says whether a file of a folder is a set by its name."""
  return name.lower().endswith(_ENDING) and not name.startswith(".")


def parse(content: bytes, *, origin: str) -> tuple[list[bytes], list[bool]]:
  """Returns the images, as encoded, and whether each pair is of one person.

  Raises:
    errors.DataError: It is no such pickle, or one that would run code.
  """
  try:
    _check_memo(content)
    loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    images, same = (_items(part) for part in loaded)
    pictures = _pictures(images, most_bytes=len(content))
    flags = [_flag(one) for one in same]
  except errors.DataError as error:
    raise errors.DataError(f"{origin}: {error}") from error
  except Exception as error:  # a damaged pickle fails anywhere in the parser
    storage.refuse_kind(content, origin)
    raise errors.DataError(
      f"{origin} is not one of InsightFace's .bin sets ({error})."
    ) from error
  if not flags or len(pictures) != 2 * len(flags):
    raise errors.DataError(
      f"{origin} has {len(pictures)} images for {len(flags)} pairs, not two each."
    )
  return pictures, flags


def _groups(same: Sequence[bool]) -> Iterator[base.IdentityGroup]:
  """Yields the identities, in the order of the images."""
  digits = len(str(2 * len(same)))
  for pair, is_same in enumerate(same):
    first, second = f"{pair:0{digits}d}a", f"{pair:0{digits}d}b"
    members = {first: [0, 1]} if is_same else {first: [0], second: [1]}
    for identity, places in members.items():
      numbers = [2 * pair + place for place in places]
      paths = [f"{identity}/{number:0{digits}d}.jpg" for number in numbers]
      yield base.new_group(identity, paths, starts=numbers)


class _Stored:
  """An object as a pickle describes it: what it was made of and its state."""

  def __init__(self, *arguments: Any) -> None:
    self.arguments = arguments
    self.state: Any = None

  def __setstate__(self, state: Any) -> None:
    self.state = state


class _Array(_Stored):
  """A NumPy array; its state is (version, shape, dtype, column order, content)."""


class _Buffer(_Array):
  """A NumPy array as protocol 5 has it: made of content, dtype, shape and order."""

  def __init__(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
    super().__init__()
    self.state = (1, shape, dtype, order, content)


class _Scalar(_Stored):
  """A NumPy number; made of dtype and content."""


class _Dtype(_Stored):
  """A NumPy dtype; made of its name first."""


class _Marker(_Stored):
  """A class that a pickle only names."""


class _Text(_Stored):
  """Bytes that Python 3 writes into old pickles as text and its encoding."""


class _NoBytes(_Stored):
  """Empty bytes, which Python 3 writes into old pickles as a call without arguments."""


_KNOWN = {
  ("_codecs", "encode"): _Text,
  ("__builtin__", "bytes"): _NoBytes,
  ("builtins", "bytes"): _NoBytes,
  **{
    (f"{package}.{module}", name): made
    for package in ("numpy.core", "numpy._core")
    for module, name, made in (
      ("multiarray", "_reconstruct", _Array),
      ("multiarray", "scalar", _Scalar),
      ("numeric", "_frombuffer", _Buffer),
    )
  },
  ("numpy", "ndarray"): _Marker,
  ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
  """Knows the names in _KNOWN and no others; what they make only holds data."""

  def find_class(self, module: str, name: str) -> Any:
    """Returns the stand-in for a name; DataError for any other."""
    if (module, name) not in _KNOWN:
      raise errors.DataError(
        f"the file wants to run {module}.{name}, which no list of images needs; do not "
        "trust it."
      )
    return _KNOWN[module, name]


def _check_memo(content: bytes) -> None:
  """Raises DataError for a pickle that makes the reader reserve memory for nothing."""
  for operation, argument, _ in pickletools.genops(content):
    if operation.name.endswith("PUT") and int(argument or 0) > _MOST_MEMO:
      raise errors.DataError(f"the pickle counts {argument} objects.")


def _items(value: Any) -> Sequence[Any]:
  """Returns the elements of a list or of a one-dimensional array."""
  if isinstance(value, list | tuple):
    return value
  if isinstance(value, _Array):
    _, shape, dtype, _, content = value.state
    if isinstance(content, list):
      return content
    numbers = _numbers(dtype, content)
    if list(shape) != [len(numbers)]:
      raise errors.DataError(f"an array of shape {shape}, not of one dimension.")
    return numbers
  raise errors.DataError(f"{type(value).__name__} where a list was expected.")


def _pictures(images: Sequence[Any], *, most_bytes: int) -> list[bytes]:
  """Returns the encoded images; one that the pickle names several times is one object.

  Raises:
    errors.DataError: Together they are longer than the file, which a few bytes can ask
      for that name one long text many times.
  """
  made: dict[int, bytes] = {}
  for image in images:
    if id(image) not in made:
      made[id(image)] = _bytes(image)
      most_bytes -= len(made[id(image)])
    if most_bytes < 0:
      raise errors.DataError("its images are longer than the file.")
  return [made[id(image)] for image in images]


def _bytes(value: Any) -> bytes:
  """Returns an encoded image."""
  return _raw(value, "u1") if isinstance(value, _Array) else _content(value)


def _content(value: Any) -> bytes:
  """Returns bytes, in whichever way the pickle holds them."""
  if isinstance(value, _Text) and value.arguments[1] in ("latin1", b"latin1"):
    value = value.arguments[0]
  if isinstance(value, _NoBytes) and not value.arguments:
    return b""
  if isinstance(value, str):
    return value.encode("latin1")
  if isinstance(value, bytes | bytearray):
    return bytes(value)
  raise errors.DataError(f"{type(value).__name__} where bytes were expected.")


def _flag(value: Any) -> bool:
  """Returns a truth value."""
  if isinstance(value, _Scalar):
    (value,) = _numbers(*value.arguments)
  if value in (0, 1):
    return bool(value)
  raise errors.DataError(f"{value!r:.40} where True or False was expected.")


def _numbers(dtype: Any, content: Any) -> list[Any]:
  """Returns the numbers or truth values that NumPy's bytes hold."""
  if not isinstance(dtype, _Dtype):
    raise errors.DataError("an array that is none.")
  name = _content(dtype.arguments[0]).decode()
  if name not in _NUMBERS:
    raise errors.DataError(f"an array of {name:.40}, not of truth values or numbers.")
  is_big_endian = dtype.state is not None and _content(dtype.state[1]) == b">"
  number = np.dtype(name).newbyteorder(">" if is_big_endian else "<")
  return np.frombuffer(_content(content), number).tolist()


def _raw(value: _Array, kind: str) -> bytes:
  """Returns the content of an array of bytes or of truth values."""
  _, shape, dtype, _, raw = value.state
  if not isinstance(dtype, _Dtype):
    raise errors.DataError("an array that is none.")
  name, content = _content(dtype.arguments[0]).decode(), _content(raw)
  if name != kind or list(shape) != [len(content)]:
    raise errors.DataError(f"an array of {name} and shape {shape}, not of {kind}.")
  return content
