"""What tests do to files."""

import os

from facedist import storage


def flip_byte(path: str | os.PathLike[str], place: int) -> None:
  """Flips a bit of a byte of a file, local or in a bucket."""
  content = bytearray(storage.read_bytes(str(path)))
  content[place] ^= 1
  storage.write_bytes(str(path), bytes(content))
