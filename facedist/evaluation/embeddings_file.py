"""Files of embeddings, written and read by suffix: .json, .jsonl, .npz and .parquet.

Each holds the same: facts that are said once (network, checkpoint, weights), then the
path, identity and embedding of each image, then the images that were skipped.

  .json     One object: the facts, "embeddings" with one entry a line, "skipped".
  .jsonl    A first line {"facts": ...}, then one line an image, as in "embeddings"; a
            skipped image is a line {"path", "reason"} in its place.
  .npz      Arrays without pickles: float32[n, embedding] `embeddings`, text `paths` and
            `identities` ('' where not known), `skipped_paths`, `skipped_reasons`,
            int64 `skipped_places`, the embeddings before each, and `facts`, JSON.
  .parquet  Columns path, identity (null where not known) and embedding, a list of
            float32 of fixed size; facts and skipped are JSON in the file's metadata.

Text has six significant digits, which moves a cosine by less than 1e-6; the others are
exact. While writing, memory holds no embeddings but those of one row group of Parquet.
"""

import abc
import collections
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from facedist import errors, storage

_ROWS_OF_A_GROUP = 4096  # 8 MB of embeddings of 512 floats
_PARQUET_FACTS = b"facedist"


class EmbeddingsWriter(abc.ABC):
  """Writes a file image by image; leaving the body without an error completes it."""

  def __init__(self, path: str, facts: Mapping[str, Any]) -> None:
    """Starts the file.

    Args:
      path: A local file to write.
      facts: What is said once, such as `embedding_size`.
    """
    self._facts = dict(facts)
    self._skipped: list[dict[str, str]] = []
    self._stack = contextlib.ExitStack()
    self._stream = self._stack.enter_context(open(path, "wb"))  # noqa: SIM115

  @property
  def num_skipped(self) -> int:
    """Number of images without an embedding."""
    return len(self._skipped)

  def add(self, *, path: str, identity: str | None, embedding: np.ndarray) -> None:
    """Writes the finite float32[embedding] of an image."""
    self._add(path, identity, embedding)

  def skip(self, *, path: str, reason: str) -> None:
    """Notes an image that has no embedding."""
    self._skipped.append({"path": path, "reason": reason})

  @abc.abstractmethod
  def _add(self, path: str, identity: str | None, embedding: np.ndarray) -> None:
    """Writes an image, or keeps it for `_finish`."""

  @abc.abstractmethod
  def _finish(self) -> None:
    """Writes the end of the file."""

  def __enter__(self) -> "EmbeddingsWriter":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    with self._stack:
      if kind is None:
        self._finish()


class JsonWriter(EmbeddingsWriter):
  """One JSON object; each embedding is a line of its own, for line tools."""

  def __init__(self, path: str, facts: Mapping[str, Any]) -> None:
    super().__init__(path, facts)
    self._separator = "\n"
    lines = [f"{json.dumps(name)}: {json.dumps(facts[name])},\n" for name in facts]
    self._stream.write("".join(["{\n", *lines, '"embeddings": [']).encode())

  def _add(self, path: str, identity: str | None, embedding: np.ndarray) -> None:
    entry = _entry(path, identity, embedding)
    self._stream.write(f"{self._separator}{entry}".encode())
    self._separator = ",\n"

  def _finish(self) -> None:
    skipped = json.dumps(self._skipped, indent=1)
    self._stream.write(f'\n],\n"skipped": {skipped}\n}}\n'.encode())


class JsonLinesWriter(EmbeddingsWriter):
  """JSON Lines: the facts, then an image a line."""

  def __init__(self, path: str, facts: Mapping[str, Any]) -> None:
    super().__init__(path, facts)
    self._stream.write(json.dumps({"facts": facts}).encode() + b"\n")

  def _add(self, path: str, identity: str | None, embedding: np.ndarray) -> None:
    self._stream.write(_entry(path, identity, embedding).encode() + b"\n")

  def skip(self, *, path: str, reason: str) -> None:
    """Writes a line that says why the image has no embedding."""
    super().skip(path=path, reason=reason)
    self._stream.write(json.dumps(self._skipped[-1]).encode() + b"\n")

  def _finish(self) -> None:
    pass


class NpzWriter(EmbeddingsWriter):
  """NumPy's .npz; embeddings wait in a file without a name until their count is known.

  That file is in the folder of the output, and takes as much of its disk again.
  """

  def __init__(self, path: str, facts: Mapping[str, Any]) -> None:
    super().__init__(path, facts)
    folder = os.path.dirname(os.path.abspath(path))
    self._rows = self._stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
    self._size = int(facts.get("embedding_size", 0))
    self._paths: list[str] = []
    self._identities: list[str] = []
    self._places: list[int] = []

  def skip(self, *, path: str, reason: str) -> None:
    """Notes an image that has no embedding, and its place among those that have."""
    super().skip(path=path, reason=reason)
    self._places.append(len(self._paths))

  def _add(self, path: str, identity: str | None, embedding: np.ndarray) -> None:
    self._size = len(embedding)
    self._rows.write(embedding.astype("<f4").tobytes())
    self._paths.append(path)
    self._identities.append(identity or "")

  def _finish(self) -> None:
    skipped = self._skipped
    arrays = {
      "paths": np.array(self._paths, np.str_),
      "identities": np.array(self._identities, np.str_),
      "skipped_paths": np.array([each["path"] for each in skipped], np.str_),
      "skipped_reasons": np.array([each["reason"] for each in skipped], np.str_),
      "skipped_places": np.array(self._places, np.int64),
      "facts": np.array(json.dumps(self._facts), np.str_),
    }
    header = {
      "descr": "<f4",
      "fortran_order": False,
      "shape": (len(self._paths), self._size),
    }
    self._rows.seek(0)
    with zipfile.ZipFile(self._stream, "w") as archive:
      with archive.open("embeddings.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        shutil.copyfileobj(self._rows, member)
      for name, array in arrays.items():
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
          np.lib.format.write_array(member, array, allow_pickle=False)


class ParquetWriter(EmbeddingsWriter):
  """Apache Parquet, in row groups of a bounded size."""

  def __init__(self, path: str, facts: Mapping[str, Any]) -> None:
    super().__init__(path, facts)
    self._pyarrow = _import_pyarrow(path)
    self._file: Any = None
    self._schema: Any = None
    self._rows: list[tuple[str, str | None, np.ndarray]] = []

  def _add(self, path: str, identity: str | None, embedding: np.ndarray) -> None:
    self._rows.append((path, identity, embedding.astype(np.float32)))
    if len(self._rows) == _ROWS_OF_A_GROUP:
      self._flush()

  def _flush(self) -> None:
    """Writes the rows as a row group; the first decides the size of an embedding."""
    arrow = self._pyarrow
    if self._file is None:
      size = len(self._rows[0][2]) if self._rows else self._facts["embedding_size"]
      self._schema = arrow.schema(
        [
          arrow.field("path", arrow.string()),
          arrow.field("identity", arrow.string()),
          arrow.field("embedding", arrow.list_(arrow.float32(), size)),
        ]
      )
      self._file = self._stack.enter_context(
        arrow.parquet.ParquetWriter(self._stream, self._schema)
      )
    if self._rows:
      paths, identities, embeddings = zip(*self._rows, strict=True)
      floats = arrow.FixedSizeListArray.from_arrays(
        np.concatenate(embeddings), len(embeddings[0])
      )
      columns = [arrow.array(paths), arrow.array(identities, arrow.string()), floats]
      self._file.write_table(arrow.Table.from_arrays(columns, schema=self._schema))
      self._rows.clear()

  def _finish(self) -> None:
    self._flush()
    said = json.dumps({"facts": self._facts, "skipped": self._skipped})
    self._file.add_key_value_metadata({_PARQUET_FACTS: said})


FORMATS: dict[str, type[EmbeddingsWriter]] = {
  ".json": JsonWriter,
  ".jsonl": JsonLinesWriter,
  ".npz": NpzWriter,
  ".parquet": ParquetWriter,
}


def check_format(path: str, *, flag: str) -> None:
  """Checks, before work begins, that a file of this name can be written.

  Raises:
    errors.UsageError: Its suffix is none of `FORMATS`, or needs a library that is not
      installed.
  """
  if _suffix(path) not in FORMATS:
    raise errors.UsageError(
      f"--{flag}={path} must end in {', '.join(FORMATS)}; rename it."
    )
  if _suffix(path) == ".parquet":
    _import_pyarrow(path)


@contextlib.contextmanager
def new_file(
  path: str, facts: Mapping[str, Any], *, overwrite: bool
) -> Iterator[EmbeddingsWriter]:
  """Yields a writer for the suffix; the output appears whole when the body ends.

  Args:
    path: The output, local or in a bucket.
    facts: What is said once.
    overwrite: Whether to replace a file that is there.

  Raises:
    errors.UsageError: Without `overwrite`, another process made the output meanwhile.
  """
  try:
    with (
      storage.new_file(path, if_absent=not overwrite) as partial,
      FORMATS[_suffix(path)](partial, facts) as writer,
    ):
      yield writer
  except FileExistsError as error:
    raise errors.UsageError(
      f"--output={path} was made by another process; add --overwrite to replace it."
    ) from error


@dataclasses.dataclass(frozen=True)
class EmbeddingsFile:
  """What a file says.

  Attributes:
    facts: What is said once.
    paths: Name of each image.
    identities: Identity of each image; '' where it is not known.
    embeddings: float32[images, embedding], of length 1 unless loaded otherwise.
  """

  facts: dict[str, Any]
  paths: list[str]
  identities: list[str]
  embeddings: np.ndarray


def load_embeddings(
  path: str, *, labelled: bool = False, scaled: bool = True
) -> EmbeddingsFile:
  """Reads a file of embeddings, local or in a bucket; memory holds it all.

  A file with a suffix that is not in `FORMATS` is read as JSON, because facedist.embed
  once wrote JSON under any name.

  Args:
    path: Written by an `EmbeddingsWriter`.
    labelled: Whether each image must have an identity.
    scaled: Whether to scale embeddings to length 1; else they stay as in the file.

  Raises:
    errors.UsageError: It is Parquet, and pyarrow is not installed.
    errors.DataError: The file is not as `EmbeddingsWriter` writes it, is cut off, or
      has no embedding, or one that is zero, not finite or, with `labelled`, of no
      identity.
  """
  suffix = _suffix(path)
  if suffix == ".npz":
    loaded = _load_arrays(path, _read_npz, labelled=labelled, scaled=scaled)
  elif suffix == ".parquet":
    loaded = _load_arrays(path, _read_parquet, labelled=labelled, scaled=scaled)
  else:
    loaded = _load_text(
      path, is_lines=suffix == ".jsonl", labelled=labelled, scaled=scaled
    )
  return loaded


def copy_images(path: str, writer: EmbeddingsWriter) -> None:
  """Writes the embedded and skipped images of a complete .npz file, in its order."""
  with storage.local_copy(path) as local_path, np.load(local_path) as arrays:
    embeddings, paths, identities = (
      arrays[name] for name in ("embeddings", "paths", "identities")
    )
    skipped = collections.deque(
      zip(
        arrays["skipped_places"].tolist(),
        arrays["skipped_paths"].tolist(),
        arrays["skipped_reasons"].tolist(),
        strict=True,
      )
    )
  for place in range(len(paths) + 1):
    while skipped and skipped[0][0] == place:
      _, skipped_path, reason = skipped.popleft()
      writer.skip(path=skipped_path, reason=reason)
    if place < len(paths):
      writer.add(
        path=str(paths[place]),
        identity=str(identities[place]) or None,
        embedding=embeddings[place],
      )


def check_one_network(files: Mapping[str, EmbeddingsFile]) -> None:
  """Checks that one network made files, so that their embeddings are comparable.

  Args:
    files: By their paths; a file that is compared with itself is there once.

  Raises:
    errors.DataError: Two files have different facts or sizes.
  """
  (first, of_first), *others = files.items()
  for path, each in others:
    for fact in ("embedding_size", "weights_crc32c", "mirrored"):
      if of_first.facts.get(fact) != each.facts.get(fact):
        raise errors.DataError(
          f"{first} has {fact} {of_first.facts.get(fact)}, but {path} has "
          f"{each.facts.get(fact)}; embed both with one checkpoint and flags."
        )
    if of_first.embeddings.shape[1] != each.embeddings.shape[1]:
      raise errors.DataError(
        f"{first} has embeddings of {of_first.embeddings.shape[1]} floats, but {path} "
        f"of {each.embeddings.shape[1]}; embed both with one checkpoint."
      )


def _load_text(
  path: str, *, is_lines: bool, labelled: bool, scaled: bool
) -> EmbeddingsFile:
  """Reads JSON, or JSON Lines with `is_lines`, line by line."""
  facts: dict[str, Any] = {}
  paths: list[str] = []
  identities: list[str] = []
  embeddings: list[np.ndarray] = []
  is_whole, is_before = is_lines, not is_lines
  for number, line in enumerate(storage.open_lines(path), 1):
    try:
      if number == 1:
        if is_lines:
          facts |= json.loads(line)["facts"]
        elif line != "{":
          raise ValueError("not the first line")
      elif is_before:
        is_before = line != '"embeddings": ['
        if is_before:
          facts |= json.loads("{" + line.removesuffix(",") + "}")
      elif not is_lines and line in ("],", "]"):
        is_whole = True
        break
      else:
        entry = json.loads(line if is_lines else line.removesuffix(","))
        if is_lines and "reason" in entry:
          continue
        embedding = np.array(entry["embedding"], np.float64)
        length = float(np.linalg.norm(embedding))
        if not 0 < length < np.inf:
          raise ValueError("zero or not finite")
        if not isinstance(entry["identity"], str if labelled else str | None):
          raise ValueError("of nobody")
        if embedding.ndim != 1 or (
          embeddings and embedding.shape != embeddings[0].shape
        ):
          raise ValueError("of another size")
        paths.append(str(entry["path"]))
        identities.append(entry["identity"] or "")
        embeddings.append((embedding / (length if scaled else 1)).astype(np.float32))
    except (
      ArithmeticError,
      LookupError,
      RecursionError,
      TypeError,
      ValueError,
    ) as error:
      raise _not_as_written(path, f"line {number}", error, labelled) from error
  if not is_whole or not embeddings:
    raise errors.DataError(
      f"{path} is cut off or has no embeddings; embed again with facedist.embed."
    )
  return EmbeddingsFile(facts, paths, identities, np.stack(embeddings))


def _load_arrays(
  path: str,
  read: Callable[[str], EmbeddingsFile],
  *,
  labelled: bool,
  scaled: bool,
) -> EmbeddingsFile:
  """Reads a binary file with `read`, then checks and scales its embeddings."""
  place = "as a whole"
  try:
    with storage.local_copy(path) as local_path, storage.readable(local_path):
      loaded = read(local_path)
    rows = loaded.embeddings
    if rows.ndim != 2 or rows.dtype != np.float32:
      raise ValueError(f"{rows.dtype}{list(rows.shape)} embeddings")
    if not len(rows) == len(loaded.paths) == len(loaded.identities) > 0:
      raise ValueError(f"{len(rows)} embeddings of {len(loaded.paths)} images")
    for start in range(0, len(rows), _ROWS_OF_A_GROUP):
      some = rows[start : start + _ROWS_OF_A_GROUP].astype(np.float64)
      lengths = np.linalg.norm(some, axis=1, keepdims=True)
      is_bad = ~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0))
      if labelled:
        is_bad |= np.array(loaded.identities[start : start + len(some)]) == ""
      if is_bad.any():
        place = f"its image {loaded.paths[start + int(is_bad.argmax())]}"
        raise ValueError("zero, not finite or of nobody")
      if scaled:
        rows[start : start + _ROWS_OF_A_GROUP] = some / lengths
  except (
    ArithmeticError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
  ) as error:
    raise _not_as_written(path, place, error, labelled) from error
  return loaded


def _read_npz(path: str) -> EmbeddingsFile:
  """Reads the arrays of `NpzWriter`."""
  with open(path, "rb") as stream, zipfile.ZipFile(stream):
    stream.seek(0)
    arrays = np.load(stream, allow_pickle=False)
    return EmbeddingsFile(
      dict(json.loads(str(arrays["facts"]))),
      arrays["paths"].astype(np.str_).tolist(),
      arrays["identities"].astype(np.str_).tolist(),
      arrays["embeddings"],
    )


def _read_parquet(path: str) -> EmbeddingsFile:
  """Reads the columns of `ParquetWriter`."""
  parquet = _import_pyarrow(path).parquet
  with open(path, "rb") as stream:
    try:
      table = parquet.read_table(stream)
      said = json.loads(parquet.read_metadata(stream).metadata[_PARQUET_FACTS])
    except OSError as error:  # pyarrow's, for a file that is cut off or corrupt
      raise ValueError(errors.first_line(error)) from error
  column = table["embedding"].combine_chunks()
  floats = column.flatten().to_numpy(zero_copy_only=False)
  return EmbeddingsFile(
    dict(said["facts"]),
    table["path"].to_pylist(),
    [identity or "" for identity in table["identity"].to_pylist()],
    floats.reshape(len(column), -1).copy(),
  )


def _not_as_written(
  path: str, place: str, error: Exception, labelled: bool
) -> errors.DataError:
  """Returns the error for content that no `EmbeddingsWriter` writes."""
  identity = "with an identity and " if labelled else "with "
  return errors.DataError(
    f"{path}, {place}, is not as facedist.embed writes it, {identity}a finite "
    f"embedding that is not zero ({errors.first_line(error)}); embed again."
  )


def _suffix(path: str) -> str:
  """Returns the suffix in lower case, such as .json."""
  return os.path.splitext(path)[1].lower()


def _import_pyarrow(path: str) -> Any:
  """Returns pyarrow with its Parquet.

  Raises:
    errors.UsageError: It is not installed.
  """
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise errors.UsageError(
      f"{path} is Parquet, which needs pyarrow ({error}); pip install "
      "'facedist[parquet]', or use .npz."
    ) from error
  return pyarrow


def _entry(path: str, identity: str | None, embedding: np.ndarray) -> str:
  """Returns the JSON object of an image."""
  floats = _template(len(embedding)) % tuple(embedding.tolist())
  return (
    f'{{"path": {json.dumps(path)}, "identity": {json.dumps(identity)}, '
    f'"embedding": [{floats}]}}'
  )


@functools.cache
def _template(size: int) -> str:
  return ", ".join(["%.6g"] * size)
