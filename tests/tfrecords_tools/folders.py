"""What lies in a folder, for comparing builds."""

import os
import pathlib


def files_of(folder: str | os.PathLike[str]) -> dict[str, bytes]:
  """Returns every file's bytes by its path below the folder, markers included."""
  root = pathlib.Path(folder)
  return {
    str(path.relative_to(root)): path.read_bytes()
    for path in root.rglob("*")
    if path.is_file()
  }


def times_of(folder: str | os.PathLike[str]) -> dict[str, int]:
  """Returns when every file was written, in nanoseconds."""
  root = pathlib.Path(folder)
  return {
    str(path.relative_to(root)): path.stat().st_mtime_ns
    for path in root.rglob("*")
    if path.is_file()
  }
