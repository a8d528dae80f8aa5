"""Reports for programs: a JSON object with one long list, written as it comes."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import IO, Any

from facedist import storage


class Report:
  """Writes a JSON object that holds a list; a million entries take no memory.

  Args:
    stream: A text file.
    head: Keys and values that are known before the list.
    name: The list's key.
  """

  def __init__(self, stream: IO[str], head: dict[str, Any], *, name: str) -> None:
    self._stream = stream
    self.num_entries = 0
    text = json.dumps(head, indent=1)
    stream.write(text.removesuffix("\n}") + f",\n {json.dumps(name)}: [")

  def add(self, entry: Any) -> None:
    """Writes an entry of the list, on a line of its own."""
    self._stream.write(",\n  " if self.num_entries else "\n  ")
    self._stream.write(json.dumps(entry))
    self.num_entries += 1

  def close(self, tail: dict[str, Any]) -> None:
    """Writes what is known after the list, at least one key, and ends the object."""
    text = json.dumps(tail, indent=1)
    self._stream.write("\n ],\n" + text.removeprefix("{\n") + "\n")


@contextlib.contextmanager
def new_report(
  path: str | None, head: dict[str, Any], *, name: str
) -> Iterator[Report]:
  """Yields a report; it is at `path`, local or in a bucket, if the body succeeds.

  Without a path nothing remains of it.
  """
  with new_text(path) as stream:
    yield Report(stream, head, name=name)


@contextlib.contextmanager
def new_text(path: str | None) -> Iterator[IO[str]]:
  """Yields a text stream; its content is at `path` if the body succeeds."""
  file = storage.new_file(path) if path else contextlib.nullcontext(os.devnull)
  with file as name, open(name, "w", encoding="utf-8") as stream:
    yield stream
