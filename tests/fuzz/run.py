"""Runs a coverage-guided fuzzer (atheris) on one reader, or on each in turn.

  make fuzz SECONDS=60

A find is printed with its input, which becomes a case of tests/fuzz/test_readers.py,
and the exit code is not 0. Memory is limited to 2 GB and one input to 10 s, so a reader
that hangs or believes a number in a header is found as well.
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
  from tests.fuzz import readers


def main() -> int:
  """Fuzzes; each reader in a process of its own, since the fuzzer ends the process."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--reader", choices=sorted(readers.READERS))
  parser.add_argument("--seconds", type=int, default=60, help="for each reader")
  given = parser.parse_args()
  if given.reader:
    _fuzz(given.reader, given.seconds)
  codes = {}
  for reader in sorted(readers.READERS):
    print(f"fuzzing the reader {reader!r} for {given.seconds} s", flush=True)
    command = [sys.executable, "-m", "tests.fuzz.run", f"--reader={reader}"]
    done = subprocess.run([*command, f"--seconds={given.seconds}"], check=False)
    codes[reader] = done.returncode
  failed = [reader for reader, code in codes.items() if code]
  print(f"finds in: {', '.join(failed)}" if failed else "no finds")
  return 1 if failed else 0


def _fuzz(reader: str, seconds: int) -> None:
  """Fuzzes one reader; does not return."""
  with tempfile.TemporaryDirectory(prefix="facedist-fuzz-") as folder:
    for number, content in enumerate(readers.seeds()[reader]):
      (pathlib.Path(folder) / str(number)).write_bytes(content)
    limits = [
      "-timeout=10",
      "-rss_limit_mb=2048",
      "-max_len=20000",
      "-print_final_stats=1",
    ]
    command = [sys.argv[0], f"-max_total_time={seconds}", *limits, folder]
    atheris.Setup(command, readers.READERS[reader])
    atheris.Fuzz()


if __name__ == "__main__":
  sys.exit(main())
