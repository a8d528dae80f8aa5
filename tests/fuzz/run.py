"""Runs a coverage-guided fuzzer (atheris) on one reader, or on each in turn.

  make fuzz SECONDS=60

A find is printed with its input, which goes into tests/fuzz/corpus, and the exit code
is not 0. It starts from the seeds and from that corpus; with --found=FOLDER what
reaches new code stays there, and with --keep as well the smallest of these files that
reach what no other does are taken into the corpus, which the tests read. Memory is
limited to 2 GB and one input to 10 s, so a reader that hangs or believes a number in a
header is found as well.
"""

import argparse
import importlib
import pathlib
import subprocess
import sys
import tempfile

# Of the extra `fuzz`: not every platform has its wheel, and no test needs it.
atheris = importlib.import_module("atheris")
with atheris.instrument_imports(include=["facedist", "tfrecords_tools", "json", "csv"]):
  from tests.fuzz import readers, seeds


def main() -> int:
  """Fuzzes; each reader in a process of its own, since the fuzzer ends the process."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--reader", choices=sorted(readers.READERS))
  parser.add_argument("--seconds", type=int, default=60, help="for each reader")
  parser.add_argument("--found", help="folder for what reaches new code")
  parser.add_argument("--keep", action="store_true", help="take what was --found")
  given, limits = parser.parse_known_args()
  if given.reader and given.found:
    limits.append(f"-max_total_time={given.seconds}")
    _fuzz(given.reader, pathlib.Path(given.found) / given.reader, limits, given.keep)
  codes = {}
  with tempfile.TemporaryDirectory(prefix="facedist-fuzz-") as scratch:
    for reader in [given.reader] if given.reader else sorted(readers.READERS):
      print(f"fuzzing the reader {reader!r} for {given.seconds} s", flush=True)
      flags = (f"--reader={reader}", f"--seconds={given.seconds}")
      command = [sys.executable, "-m", "tests.fuzz.run", *flags]
      command += [f"--found={given.found or scratch}", *["--keep"] * given.keep]
      codes[reader] = subprocess.run(command, check=False).returncode
  failed = [reader for reader, code in codes.items() if code]
  print(f"finds in: {', '.join(failed)}" if failed else "no finds")
  return 1 if failed else 0


def _fuzz(reader: str, folder: pathlib.Path, limits: list[str], keep: bool) -> None:
  """Fuzzes one reader, or takes what it found into the corpus; does not return."""
  folder.mkdir(parents=True, exist_ok=True)
  for number, content in enumerate(seeds.by_reader()[reader]):
    (folder / str(number)).write_bytes(content)
    readers.READERS[reader](content)  # what it imports is no part of an input's time
  folders = [str(folder), str(seeds.CORPUS / reader)]
  # The fuzzer starts itself again to merge, by this line of a shell.
  itself = f"{sys.executable} -m tests.fuzz.run --reader={reader}"
  itself += f" --found={folder.parent}"
  if keep:
    limits += ["-merge=1", "-max_len=4096"]
    folders.reverse()
  command = [itself, "-timeout=10", "-rss_limit_mb=2048", *limits, *folders]
  atheris.Setup(command, readers.READERS[reader])
  atheris.Fuzz()


if __name__ == "__main__":
  sys.exit(main())
