"""How much memory a measurement took."""

import pathlib
import re


def peak_bytes() -> int:
  """Returns the most memory that this program has had resident.

  The kernel's other figure, ru_maxrss, counts the parent's memory too, since a new
  process is its copy before it becomes a program of its own.
  """
  status = pathlib.Path("/proc/self/status").read_text()
  found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
  return 1024 * int(found[1]) if found else 0
