"""`embeddings.json`: one JSON document, written and read embedding by embedding."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from facedist import errors, storage


class EmbeddingsJson:
  """Writes the document piece by piece; only what was skipped is kept in memory.

  Floats have six significant digits, which moves a cosine by less than 1e-6. Each
  embedding is a line of its own, so that line tools can read the file too.
  """

  def __init__(self, stream: TextIO, facts: Mapping[str, Any]) -> None:
    """Writes the start of the document.

    Args:
      stream: Where to write.
      facts: What is said once, before the embeddings.
    """
    self._stream = stream
    self._skipped: list[dict[str, str]] = []
    self._separator = "\n"
    stream.write("{\n")
    for name, value in facts.items():
      stream.write(f"{json.dumps(name)}: {json.dumps(value)},\n")
    stream.write('"embeddings": [')

  @property
  def num_skipped(self) -> int:
    """Number of images without an embedding."""
    return len(self._skipped)

  def add(self, *, path: str, identity: str | None, embedding: np.ndarray) -> None:
    """Writes the finite float32[embedding] of an image."""
    floats = _template(len(embedding)) % tuple(embedding.tolist())
    self._stream.write(
      f'{self._separator}{{"path": {json.dumps(path)}, "identity": '
      f'{json.dumps(identity)}, "embedding": [{floats}]}}'
    )
    self._separator = ",\n"

  def skip(self, *, path: str, reason: str) -> None:
    """Notes an image that has no embedding, for the end of the document."""
    self._skipped.append({"path": path, "reason": reason})

  def __enter__(self) -> "EmbeddingsJson":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    if kind is None:
      self._stream.write(
        f'\n],\n"skipped": {json.dumps(self._skipped, indent=1)}\n}}\n'
      )


@dataclasses.dataclass(frozen=True)
class LabelledEmbeddings:
  """What such a file says of images whose identity is known.

  Attributes:
    facts: What is said once, before the embeddings.
    paths: Name of each image.
    identities: Identity of each image.
    embeddings: float32[images, embedding] of length 1.
  """

  facts: dict[str, Any]
  paths: list[str]
  identities: list[str]
  embeddings: np.ndarray


def load(path: str) -> LabelledEmbeddings:
  """Reads a file of labelled embeddings, local or in a bucket.

  Raises:
    errors.DataError: The file is not as `EmbeddingsJson` writes it, is cut off, or has
      no embedding, or one that is zero, not finite or of no identity.
  """
  facts: dict[str, Any] = {}
  paths: list[str] = []
  identities: list[str] = []
  embeddings: list[np.ndarray] = []
  is_whole = is_before = False
  for number, line in enumerate(storage.open_lines(path), 1):
    try:
      if number == 1:
        if line != "{":
          raise ValueError("not the first line")
        is_before = True
      elif is_before:
        is_before = line != '"embeddings": ['
        if is_before:
          facts |= json.loads("{" + line.removesuffix(",") + "}")
      elif line in ("],", "]"):
        is_whole = True
        break
      else:
        entry = json.loads(line.removesuffix(","))
        embedding = np.array(entry["embedding"], np.float64)
        length = float(np.linalg.norm(embedding))
        if not (0 < length < np.inf and isinstance(entry["identity"], str)):
          raise ValueError("zero, not finite, or of nobody")
        if embeddings and embedding.shape != embeddings[0].shape:
          raise ValueError("of another size")
        paths.append(str(entry["path"]))
        identities.append(entry["identity"])
        embeddings.append((embedding / length).astype(np.float32))
    except (
      ArithmeticError,
      LookupError,
      RecursionError,
      TypeError,
      ValueError,
    ) as error:
      raise errors.DataError(
        f"{path}, line {number}, is not as facedist.embed writes it, with an identity "
        f"and a finite embedding that is not zero ({error}); embed again."
      ) from error
  if not is_whole or not embeddings:
    raise errors.DataError(
      f"{path} is cut off or has no embeddings; embed again with facedist.embed."
    )
  return LabelledEmbeddings(facts, paths, identities, np.stack(embeddings))


@contextlib.contextmanager
def output_file(path: str, *, overwrite: bool) -> Iterator[str]:
  """Yields a local name to write to; the output appears whole when the body ends.

  Raises:
    errors.UsageError: Without `overwrite`, another process made the output meanwhile.
  """
  try:
    with storage.new_file(path, if_absent=not overwrite) as partial:
      yield partial
  except FileExistsError as error:
    raise errors.UsageError(
      f"--output={path} was made by another process; add --overwrite to replace it."
    ) from error


@functools.cache
def _template(size: int) -> str:
  return ", ".join(["%.6g"] * size)
