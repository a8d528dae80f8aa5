"""Text files read line by line, whatever their size."""

from collections.abc import Iterable, Iterator

from facedist import errors
from facedist.storage import contents

_MOST_LINE_BYTES = 1 << 20


def lines_of(pieces: Iterable[bytes], path: str) -> Iterator[str]:
  """Yields the lines of UTF-8 text without their ends, which may be \\n or \\r\\n.

  Args:
    pieces: The file's content, cut anywhere.
    path: The file's name, for messages.

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
      yield _decoded(line, path, number)
    _check_length(rest, path, number + 1)
  if rest:
    yield _decoded(rest, path, number + 1)


def _check_length(line: bytes, path: str, number: int) -> None:
  """Raises DataError for a line, or the start of one, that is too long."""
  if len(line) > _MOST_LINE_BYTES:
    raise errors.DataError(
      f"{path}, line {number} is longer than 1 MiB; give a text file."
    )


def _decoded(line: bytes, path: str, number: int) -> str:
  """Returns the text of a line without its end."""
  _check_length(line, path, number)
  try:
    return line.removesuffix(b"\r").decode()
  except UnicodeDecodeError as error:
    if number == 1:
      contents.refuse_kind(line, path)
    raise errors.DataError(
      f"{path}, line {number} is not UTF-8 at its byte {error.start}; convert the file."
    ) from error
