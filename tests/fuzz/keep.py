"""Takes into tests/fuzz/corpus the smallest files that reach what no other does.

  python -m tests.fuzz.keep FOLDER

FOLDER is what `python -m tests.fuzz.run --found=FOLDER` has filled.
"""

import hashlib
import pathlib
import sys
import types
from typing import Any

from tests.fuzz import readers, seeds

CORPUS = pathlib.Path(__file__).parent / "corpus"
_MAX_BYTES = 4096
_MAX_FILES = 30  # of a reader
_TRACED = ("/facedist/", "/tfrecords_tools/")

Step = tuple[str, int, int]
"""A module, and the lines of a step from one to the next."""


def steps_of(reader: str, content: bytes) -> set[Step]:
  """Returns the steps in this project's modules that a reader takes."""
  taken: set[Step] = set()
  before: dict[int, int] = {}

  def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
    name = frame.f_code.co_filename
    if not any(folder in name for folder in _TRACED):
      return None
    taken.add((name, before.get(id(frame), 0), frame.f_lineno))
    before[id(frame)] = frame.f_lineno
    return trace

  sys.settrace(trace)
  try:
    readers.READERS[reader](content)
  finally:
    sys.settrace(None)
  return taken


def keep(reader: str, found: pathlib.Path) -> int:
  """Adds to the corpus of a reader; returns the number of its files."""
  folder = CORPUS / reader
  folder.mkdir(parents=True, exist_ok=True)
  known: set[Step] = set()
  for content in seeds.by_reader()[reader]:
    known |= steps_of(reader, content)
  for path in folder.iterdir():
    known |= steps_of(reader, path.read_bytes())
  new = sorted((path.read_bytes() for path in found.iterdir()), key=len)
  for content in new:
    if len(content) > _MAX_BYTES or len(list(folder.iterdir())) >= _MAX_FILES:
      break
    steps = steps_of(reader, content)
    if steps - known:
      known |= steps
      name = hashlib.sha256(content).hexdigest()[:12]
      (folder / name).write_bytes(content)
  return len(list(folder.iterdir()))


if __name__ == "__main__":
  for one in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    print(f"{one.name}: {keep(one.name, one)} files", flush=True)
