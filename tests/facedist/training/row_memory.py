"""Prints by how much memory grows while a table's rows are drawn, saved and restored.

A process of its own, since only what the whole process holds shows TensorFlow's
buffers. The argument is an empty folder.
"""

import json
import pathlib
import resource
import sys
import threading
import time

from facedist.models.heads.class_weights import RowTable
from facedist.training.checkpoint import sharded

NUM_ROWS, WIDTH, PIECE_ROWS = 200_000, 128, 5_000


class Growth:
  """How many bytes more than at first are resident at most; looks every millisecond."""

  def __enter__(self) -> "Growth":
    self._first = self._most = _resident()
    self._is_over = threading.Event()
    self._thread = threading.Thread(target=self._monitor)
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._is_over.set()
    self._thread.join()

  @property
  def bytes(self) -> int:
    return self._most - self._first

  def _monitor(self) -> None:
    while not self._is_over.is_set():
      self._most = max(self._most, _resident())
      time.sleep(0.001)


def _resident() -> int:
  pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
  return int(pages) * resource.getpagesize()


def main(folder: str) -> None:
  """Prints a line of JSON."""
  table = RowTable(
    num_rows=NUM_ROWS, row_shape=(WIDTH,), slots=("momentum",), places={0: "CPU:0"}
  )
  RowTable(num_rows=9, row_shape=(WIDTH,), places={0: "CPU:0"}).draw_class_weights(1)
  with Growth() as drawn:
    table.draw_class_weights(1, piece_rows=PIECE_ROWS)
  with Growth() as saved:
    planned = sharded.plan_files(table, "step-00000001", piece_rows=PIECE_ROWS)
    sums = [sharded.write_file(table, file, folder) for file in planned]
  content = sharded.section_of(table, planned, sums)
  with Growth() as restored:
    sharded.read_files(table, content, folder, piece_rows=PIECE_ROWS)
  growths = {"drawn": drawn, "saved": saved, "restored": restored}
  found = {name: growth.bytes for name, growth in growths.items()}
  print(json.dumps({"column": 4 * NUM_ROWS * WIDTH, **found}))


if __name__ == "__main__":
  main(sys.argv[1])
