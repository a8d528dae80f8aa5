"""Prints by how much memory grows while a table's rows are drawn, saved and restored.

A process of its own, since only what the whole process holds shows TensorFlow's
buffers. The argument is an empty folder.
"""

import json
import resource
import sys
from collections.abc import Callable

from facedist.models.heads.class_weights import RowTable
from facedist.training.checkpoint import sharded

NUM_ROWS, WIDTH, PIECE_ROWS = 200_000, 128, 5_000


def growth(action: Callable[[], object]) -> int:
  """Returns by how many bytes an action raises the most that was ever resident."""
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  action()
  return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main(folder: str) -> None:
  """Prints a line of JSON."""
  table = RowTable(
    num_rows=NUM_ROWS, row_shape=(WIDTH,), slots=("momentum",), places={0: "CPU:0"}
  )
  RowTable(num_rows=9, row_shape=(WIDTH,), places={0: "CPU:0"}).draw_class_weights(1)
  planned = sharded.plan_files(table, "step-00000001", piece_rows=PIECE_ROWS)
  sums: list[int] = []

  def draw() -> None:
    table.draw_class_weights(1, piece_rows=PIECE_ROWS)

  def save() -> None:
    sums.extend(sharded.write_file(table, file, folder) for file in planned)

  def restore() -> None:
    content = sharded.section_of(table, planned, sums)
    sharded.read_files(table, content, folder, piece_rows=PIECE_ROWS)

  found = {action.__name__: growth(action) for action in (draw, save, restore)}
  print(json.dumps({"column": 4 * NUM_ROWS * WIDTH, **found}))


if __name__ == "__main__":
  main(sys.argv[1])
