"""Text files read line by line, whatever their size."""

import re
from collections.abc import Iterable, Iterator

from facedist import errors
from facedist.storage import contents

_MOST_LINE_BYTES = 1 << 20
_CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f]")  # a text file has no others than tabs


def lines_of(
  pieces: Iterable[bytes], path: str, *, escape: bool = False
) -> Iterator[str]:
  """Yields the lines of UTF-8 text without their ends, which may be \\n or \\r\\n.

  Args:
    pieces: The file's content, cut anywhere.
    path: The file's name, for messages.
    escape: Whether bytes that are no UTF-8 become \\xNN, as in a list of old names.

  Raises:
    errors.DataError: A line is not UTF-8 or longer than 1 MiB, or the text stands for
      a file that is elsewhere.
  """
  number, rest = 0, b""
  for piece in pieces:
    if not number and (kind := contents.kind_of_text(rest + piece)):
      raise errors.DataError(f"{path} is {kind}.")
    *whole, rest = (rest + piece).split(b"\n")
    for line in whole:
      number += 1
      yield _decoded(line, path, number, escape)
    _check_length(rest, path, number + 1)
  if rest:
    yield _decoded(rest, path, number + 1, escape)


def _check_length(line: bytes, path: str, number: int) -> None:
  """Raises DataError for a line, or the start of one, that is too long."""
  if len(line) > _MOST_LINE_BYTES:
    raise errors.DataError(
      f"{path}, line {number} is longer than 1 MiB; give a text file."
    )


def _decoded(line: bytes, path: str, number: int, escape: bool) -> str:
  """Returns the text of a line without its end."""
  _check_length(line, path, number)
  try:
    return line.removesuffix(b"\r").decode()
  except UnicodeDecodeError as error:
    if escape and not _CONTROL.search(line.removesuffix(b"\r")):
      return line.removesuffix(b"\r").decode(errors="backslashreplace")
    if number == 1:
      contents.refuse_kind(line, path)
    raise errors.DataError(
      f"{path}, line {number} is not UTF-8 at its byte {error.start}; convert the file."
    ) from error
