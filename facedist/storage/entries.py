"""What is known of a file without reading it."""

from typing import NamedTuple


class Entry(NamedTuple):
  """A file found by `walk`.

  Attributes:
    path: Below the folder, with forward slashes.
    size: Bytes.
  """

  path: str
  size: int


class Status(NamedTuple):
  """A file as it was at one moment.

  Attributes:
    size: Bytes.
    generation: A token that changes when the file is replaced.
  """

  size: int
  generation: str
