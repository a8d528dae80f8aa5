"""`embeddings.json`: one valid JSON document, written embedding by embedding."""

import contextlib
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
