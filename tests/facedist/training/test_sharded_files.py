"""Files of rows: what any number of replicas writes, any other number reads."""

import json
import os
import pathlib
import subprocess
import sys
import tracemalloc

import google_crc32c
import numpy as np
import pytest

from facedist import errors
from facedist.models.heads.class_weights import RowTable
from facedist.training.checkpoint import sharded

COLUMNS = ("centres", "momentum")
STEM = "step-00000100"


def table(
  num_replicas: int,
  here: range | None = None,
  *,
  num_rows: int = 11,
  row_shape: tuple[int, ...] = (3,),
) -> RowTable:
  """A table of zeros; `here` are the replicas of this process, or all."""
  return RowTable(
    num_rows=num_rows,
    row_shape=row_shape,
    slots=COLUMNS[1:],
    num_replicas=num_replicas,
    places=dict.fromkeys(here or range(num_replicas), "CPU:0"),
  )


def expected(column: str, made: RowTable) -> np.ndarray:
  """All rows: distinct numbers that depend on column and identity."""
  shape = (made.num_rows, *made.row_shape)
  return (
    np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    + 1
    + 1000 * COLUMNS.index(column)
  )


def fill(made: RowTable) -> RowTable:
  """Sets a table's rows; its padding becomes a number that no row has."""
  for shard in made.shards:
    for column, variable in shard.variables.items():
      values = np.full(variable.shape, -7, np.float32)
      values[: shard.count] = expected(column, made)[shard.first : shard.stop]
      variable.assign(values)
  return made


def save(folder: str, *parts: RowTable, piece_rows: int = 2) -> dict:
  """Writes the parts of one table as their processes do; returns the marker's rows."""
  planned = sharded.plan_files(parts[0], STEM, piece_rows=piece_rows)
  checksums = [
    sum(sharded.write_file(part, file, folder) for part in holders)
    for file in planned
    if (holders := [part for part in parts if sharded.is_local(part, file)])
  ]
  content = sharded.section_of(parts[0], planned, checksums)
  return json.loads(json.dumps(content))  # as a marker keeps it


def check_rows(made: RowTable) -> None:
  for shard in made.shards:
    for column, variable in shard.variables.items():
      np.testing.assert_array_equal(
        variable.numpy()[: shard.count],
        expected(column, made)[shard.first : shard.stop],
      )
      assert not variable.numpy()[shard.count :].any()  # padding stays as it was


@pytest.mark.parametrize(
  ("writers", "readers"),
  [(2, 1), (2, 2), (2, 4), (1, 4), (4, 3), (3, 2), (1, 1), (8, 2)],
)
@pytest.mark.parametrize(
  ("written_by", "read_by", "row_shape"), [(2, 3, (3,)), (3, 2, (2, 3)), (50, 50, (1,))]
)
def test_what_any_number_of_replicas_wrote_any_number_reads(
  writers: int,
  readers: int,
  written_by: int,
  read_by: int,
  row_shape: tuple[int, ...],
  tmp_path: pathlib.Path,
):
  parts = [
    fill(table(writers, range(number, number + 1), row_shape=row_shape))
    for number in range(writers)
  ]
  content = save(str(tmp_path), *parts, piece_rows=written_by)
  for number in range(readers):
    made = table(readers, range(number, number + 1), row_shape=row_shape)
    sharded.check_fits(made, content, "step-00000100")
    sharded.read_files(made, content, str(tmp_path), piece_rows=read_by)
    check_rows(made)


def test_a_process_of_several_replicas_writes_and_reads_all_of_theirs(
  tmp_path: pathlib.Path,
):
  parts = [fill(table(4, here)) for here in (range(2), range(2, 4))]
  content = save(str(tmp_path), *parts)
  made = table(6, range(1, 4))
  sharded.read_files(made, content, str(tmp_path), piece_rows=2)
  check_rows(made)


def test_files_are_numpys_and_hold_each_row_once(tmp_path: pathlib.Path):
  made = fill(table(2))
  content = save(str(tmp_path), made, piece_rows=4)
  assert sorted(os.listdir(tmp_path)) == [
    f"step-00000100.rows-{column}-{first:08d}-{stop:08d}.npy"
    for column in COLUMNS
    for first, stop in ((0, 4), (4, 6), (6, 10), (10, 11))
  ]
  for column in COLUMNS:
    paths = sorted(tmp_path.glob(f"*.rows-{column}-*.npy"))
    rows = np.concatenate([np.load(path) for path in paths])
    np.testing.assert_array_equal(rows, expected(column, made))
  for name, facts in content["files"].items():
    found = (tmp_path / name).read_bytes()
    assert facts["bytes"] == len(found)
    assert facts["crc32c"] == google_crc32c.value(found)


def test_a_process_reads_only_the_files_of_its_own_rows(tmp_path: pathlib.Path):
  content = save(str(tmp_path), fill(table(1)))
  needed = table(3, range(1, 2))  # identities 4 to 7
  for name, facts in content["files"].items():
    if facts["stop"] <= 4 or facts["first"] >= 8:
      (tmp_path / name).unlink()
  sharded.read_files(needed, content, str(tmp_path), piece_rows=2)
  check_rows(needed)


def test_a_file_larger_than_a_piece_is_read_piece_by_piece(tmp_path: pathlib.Path):
  num_rows, width = 20_000, 128
  made = fill(table(1, num_rows=num_rows, row_shape=(width,)))
  # its writer may have had more memory
  content = save(str(tmp_path), made, piece_rows=num_rows)
  tracemalloc.start()
  sharded.read_files(made, content, str(tmp_path), piece_rows=1000)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 3.5 * 1000 * width * 4  # bytes, of 20 pieces


def test_no_process_ever_holds_a_second_copy_of_its_rows(tmp_path: pathlib.Path):
  output = subprocess.check_output(
    [sys.executable, "-m", "tests.facedist.training.row_memory", str(tmp_path)],
    cwd=pathlib.Path(__file__).parents[3],
    timeout=300,
  )
  grown = json.loads(output.splitlines()[-1])
  column = grown.pop("column")  # bytes; a piece is a fortieth of it
  assert sorted(grown) == ["draw", "restore", "save"]
  assert max(grown.values()) < 0.5 * column, grown


@pytest.mark.parametrize(
  "corrupt",
  [
    lambda content: content[:-4],
    lambda content: content + b"1234",
    lambda content: b"?" + content[1:],
    lambda content: content[:-1] + b"?",
  ],
  ids=["short", "long", "header", "rows"],
)
def test_a_corrupt_file_is_named_by_each_process_that_reads_it(
  corrupt, tmp_path: pathlib.Path
):
  content = save(str(tmp_path), fill(table(1)))
  bad = tmp_path / "step-00000100.rows-momentum-00000004-00000006.npy"
  sharded.verify_files(content, str(tmp_path))
  bad.write_bytes(corrupt(bad.read_bytes()))
  first, second = table(2, range(1)), table(2, range(1, 2))
  with pytest.raises(errors.DataError, match=bad.name):
    sharded.read_files(first, content, str(tmp_path), piece_rows=2)
  sharded.read_files(second, content, str(tmp_path), piece_rows=2)
  check_rows(second)
  with pytest.raises(errors.DataError, match=bad.name):
    sharded.verify_files(content, str(tmp_path))


def test_rows_that_are_in_no_file_are_an_error(tmp_path: pathlib.Path):
  content = save(str(tmp_path), fill(table(1)))
  content["files"].popitem()
  with pytest.raises(errors.DataError, match="lacks 1 of this worker's rows"):
    sharded.read_files(table(1), content, str(tmp_path), piece_rows=2)
