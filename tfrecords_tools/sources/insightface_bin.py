"""InsightFace's verification sets: a pickle of images and of one flag a pair.

A pickle can run any code when it is loaded. This unpickler allows a fixed list of
names, and reads NumPy's arrays as plain data.
"""

import io
import os
import pickle
import pickletools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from facedist import errors, storage
from tfrecords_tools.sources import base, tables

NUM_FOLDS = 10
_ENDING = ".bin"
_MAX_MEMO = 1 << 22


def files_of(input_dir: str) -> list[str]:
  """Returns the files that --input_dir names.

  One or several with commas between them, or folders, of which every file is taken that
  ends in .bin and is not hidden.

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
  """Says whether a path is a folder; in a bucket, whether it is no object."""
  if storage.is_bucket(path):
    return not path.lower().endswith(_ENDING) and not storage.exists(path)
  return os.path.isdir(path)


def _is_set(name: str) -> bool:
  """Says whether a file of a folder is a set by its name."""
  return name.lower().endswith(_ENDING) and not name.startswith(".")


def read(path: str) -> base.Source:
  """Reads a set; pair i is of the images 2 i and 2 i + 1.

  The file names no people, so the two images of a 'same' pair are one identity, and
  each image of another pair is an identity. Folds are ten ranges of pairs, as
  InsightFace and scikit-learn's KFold cut them.

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


def parse(content: bytes, *, origin: str) -> tuple[list[bytes], list[bool]]:
  """Returns the encoded images, and whether each pair shows one person.

  Raises:
    errors.DataError: It is no such pickle, or one that would run code.
  """
  try:
    _check_memo(content)
    loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    images, same = (_items(part) for part in loaded)
    encoded = [_image(image) for image in images]
    flags = [_flag(flag) for flag in same]
  except errors.DataError as error:
    raise errors.DataError(f"{origin}: {error}") from error
  except Exception as error:  # a corrupt pickle fails anywhere in the unpickler
    storage.refuse_kind(content, origin)
    raise errors.DataError(
      f"{origin} is not one of InsightFace's .bin sets ({error})."
    ) from error
  if not flags or len(encoded) != 2 * len(flags):
    raise errors.DataError(
      f"{origin} has {len(encoded)} images for {len(flags)} pairs, not two each."
    )
  return encoded, flags


def _check_memo(content: bytes) -> None:
  """Raises DataError for a memo index that makes the unpickler reserve gigabytes."""
  for operation, argument, _ in pickletools.genops(content):
    if operation.name.endswith("PUT") and int(argument or 0) > _MAX_MEMO:
      raise errors.DataError(f"the pickle counts {argument} objects.")


class _Dtype:
  """A NumPy dtype: its name, and the byte order of its state."""

  def __init__(self, name: str | bytes, *_: Any) -> None:
    self.numbers = np.dtype(name.decode() if isinstance(name, bytes) else name)

  def __setstate__(self, state: tuple[Any, ...]) -> None:
    if state[1] in (">", b">"):
      self.numbers = self.numbers.newbyteorder(">")


class _Array:
  """A NumPy array; its state is (version, shape, dtype, column order, content)."""

  items: Sequence[Any] | np.ndarray = ()

  def __init__(self, *_: Any) -> None:
    pass

  def __setstate__(self, state: tuple[Any, ...]) -> None:
    _, shape, dtype, _, content = state
    is_list = isinstance(content, list)  # of objects
    self.items = content if is_list else _from_buffer(content, dtype, shape).items


def _from_buffer(content: bytes, dtype: _Dtype, shape: Any, *_: Any) -> _Array:
  """Returns an array as protocol 5 stores it."""
  made = _Array()
  made.items = np.frombuffer(content, dtype.numbers).reshape(shape)
  return made


def _scalar(dtype: _Dtype, content: bytes) -> Any:
  """Returns a NumPy number as Python's."""
  return np.frombuffer(content, dtype.numbers)[0].item()


def _latin1(text: str, encoding: str | bytes) -> bytes:
  """Returns bytes that Python 3 writes into old protocols as text and its encoding."""
  return text.encode("latin1")


def _no_bytes() -> bytes:
  """Returns empty bytes, which old protocols store as a call without arguments."""
  return b""


_ALLOWED = {
  ("_codecs", "encode"): _latin1,
  ("__builtin__", "bytes"): _no_bytes,
  ("builtins", "bytes"): _no_bytes,
  **{
    (f"{package}.{module}", name): made
    for package in ("numpy.core", "numpy._core")
    for module, name, made in (
      ("multiarray", "_reconstruct", _Array),
      ("multiarray", "scalar", _scalar),
      ("numeric", "_frombuffer", _from_buffer),
    )
  },
  ("numpy", "ndarray"): None,  # only an argument of `_reconstruct`
  ("numpy", "dtype"): _Dtype,
}
"""What a pickle may name. NumPy's own classes are not safe: the state of a dtype can
make an array of objects out of any bytes, which are then used as addresses."""


class _Unpickler(pickle.Unpickler):
  """Knows the names in _ALLOWED and no others."""

  def find_class(self, module: str, name: str) -> Any:
    """Returns what stands for a name; DataError for a name that is not allowed."""
    if (module, name) not in _ALLOWED:
      raise errors.DataError(
        f"the file wants to run {module}.{name}, which no list of images needs; do not "
        "trust it."
      )
    return _ALLOWED[module, name]


def _items(value: Any) -> Sequence[Any]:
  """Returns the elements of a list or of a one-dimensional array."""
  items = value.items if isinstance(value, _Array) else value
  if isinstance(items, np.ndarray) and items.ndim == 1:
    return cast(list[Any], items.tolist())
  if isinstance(items, list | tuple):
    return items
  raise errors.DataError(f"{type(value).__name__} where a list was expected.")


def _image(value: Any) -> bytes:
  """Returns an encoded image, stored as bytes or as a one-dimensional array of them."""
  items = value.items if isinstance(value, _Array) else value
  if isinstance(items, np.ndarray) and items.dtype == np.uint8 and items.ndim == 1:
    return items.tobytes()
  if isinstance(items, bytes | bytearray):
    return bytes(items)
  raise errors.DataError(f"{type(value).__name__} where bytes were expected.")


def _flag(value: Any) -> bool:
  """Returns a truth value."""
  if isinstance(value, bool | int | float) and value in (0, 1):
    return bool(value)
  raise errors.DataError(f"{value!r:.40} where True or False was expected.")
