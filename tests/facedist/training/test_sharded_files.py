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

from facedist import errors, storage
from facedist.models.heads.class_weights import RowTable
from facedist.training.checkpoint import sharded

NUM_ROWS = 11
COLUMNS = ("centres", "momentum")
STEM = "step-00000100"


def table(
  num_replicas: int,
  *,
  here: range | None = None,
  num_rows: int = NUM_ROWS,
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
    fill(table(writers, here=range(number, number + 1), row_shape=row_shape))
    for number in range(writers)
  ]
  content = save(str(tmp_path), *parts, piece_rows=written_by)
  for number in range(readers):
    made = table(readers, here=range(number, number + 1), row_shape=row_shape)
    sharded.check_fits(made, content, "step-00000100")
    sharded.read_files(made, content, str(tmp_path), piece_rows=read_by)
    check_rows(made)


def test_a_process_of_several_replicas_writes_and_reads_all_of_theirs(
  tmp_path: pathlib.Path,
):
  parts = [fill(table(4, here=here)) for here in (range(2), range(2, 4))]
  content = save(str(tmp_path), *parts)
  made = table(6, here=range(1, 4))
  sharded.read_files(made, content, str(tmp_path), piece_rows=2)
  check_rows(made)


def test_files_are_numpys_and_hold_each_row_once(tmp_path: pathlib.Path):
  made = fill(table(2))
  content = save(str(tmp_path), made, piece_rows=4)
  assert sorted(os.listdir(tmp_path)) == [
    f"step-00000100.rows-{column}-{span}.npy"
    for column in COLUMNS
    for span in (
      "00000000-00000004",
      "00000004-00000006",
      "00000006-00000010",
      "00000010-00000011",
    )
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
  content = save(str(tmp_path), fill(table(1)), piece_rows=2)
  needed = table(3, here=range(1, 2))  # identities 4 to 7
  for name, facts in content["files"].items():
    if facts["stop"] <= 4 or facts["first"] >= 8:
      (tmp_path / name).unlink()
  sharded.read_files(needed, content, str(tmp_path), piece_rows=2)
  check_rows(needed)


def test_a_process_holds_no_more_than_a_piece_beside_its_blocks(tmp_path: pathlib.Path):
  piece_rows, num_rows, width = 1000, 20_000, 128
  piece_bytes = piece_rows * width * 4
  made = fill(table(2, num_rows=num_rows, row_shape=(width,)))
  # files larger than a piece: their writer may have had more memory
  wide = save(str(tmp_path / "wide"), made, piece_rows=num_rows)
  peaks = []
  tracemalloc.start()
  content = save(str(tmp_path / "own"), made, piece_rows=piece_rows)
  peaks.append(tracemalloc.get_traced_memory()[1])
  for folder, written in (("own", content), ("wide", wide)):
    tracemalloc.reset_peak()
    sharded.read_files(made, written, str(tmp_path / folder), piece_rows=piece_rows)
    peaks.append(tracemalloc.get_traced_memory()[1])
  tracemalloc.stop()
  assert max(peaks) < 3.5 * piece_bytes  # of 40 pieces; markers take some too


def test_no_process_ever_holds_a_second_copy_of_its_rows(tmp_path: pathlib.Path):
  """As above, with what TensorFlow takes; each piece is a fortieth of a column."""
  done = subprocess.run(
    [sys.executable, "-m", "tests.facedist.training.row_memory", str(tmp_path)],
    cwd=pathlib.Path(__file__).parents[3],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  grown = json.loads(done.stdout.splitlines()[-1])
  column = grown.pop("column")
  assert sorted(grown) == ["drawn", "restored", "saved"]
  assert max(grown.values()) < 0.5 * column, grown


@pytest.mark.parametrize(
  "corrupt",
  [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(path.read_bytes()[:-4]),
    lambda path: path.write_bytes(path.read_bytes() + b"1234"),
    lambda path: path.write_bytes(b"?" + path.read_bytes()[1:]),
    lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
  ],
  ids=["missing", "short", "long", "header", "rows"],
)
def test_a_corrupt_file_is_named_by_each_process_that_reads_it(
  corrupt, tmp_path: pathlib.Path
):
  content = save(str(tmp_path), fill(table(1)), piece_rows=2)
  bad = "step-00000100.rows-momentum-00000004-00000006.npy"
  sharded.verify_files(content, str(tmp_path))
  corrupt(tmp_path / bad)
  first, second = (table(2, here=range(one, one + 1)) for one in range(2))
  with pytest.raises(errors.DataError, match=bad):
    sharded.read_files(first, content, str(tmp_path), piece_rows=2)
  sharded.read_files(second, content, str(tmp_path), piece_rows=2)
  check_rows(second)
  with pytest.raises(errors.DataError, match=bad):
    sharded.verify_files(content, str(tmp_path))


@pytest.mark.parametrize(
  ("facts", "what"),
  [
    ({"num_rows": 12}, "num_rows is 11, not 12"),
    ({"row_shape": (4,)}, r"row_shape is \[3\], not \[4\]"),
    (
      {"slots": ("m", "v")},
      r"columns is \['centres', 'momentum'\], not \['centres', 'm', 'v'\]",
    ),
  ],
)
def test_rows_of_another_head_are_refused(
  facts: dict, what: str, tmp_path: pathlib.Path
):
  content = save(str(tmp_path), fill(table(1)))
  defaults = {"num_rows": NUM_ROWS, "row_shape": (3,), "slots": COLUMNS[1:]}
  other = RowTable(**defaults | facts, num_replicas=1, places={0: "CPU:0"})
  with pytest.raises(errors.DataError, match=what):
    sharded.check_fits(other, content, STEM)
  with pytest.raises(errors.DataError, match="does not fit this head"):
    sharded.check_fits(other, {}, STEM)


def test_rows_that_are_in_no_file_are_an_error(tmp_path: pathlib.Path):
  content = save(str(tmp_path), fill(table(1)), piece_rows=2)
  content["files"].popitem()
  with pytest.raises(errors.DataError, match="lacks 1 of this worker's rows"):
    sharded.read_files(table(1), content, str(tmp_path), piece_rows=2)


def test_rows_are_written_to_a_bucket_and_read_from_it(
  bucket: str, tmp_path: pathlib.Path
):
  parts = [fill(table(2, here=range(number, number + 1))) for number in range(2)]
  content = save(f"{bucket}/run", *parts, piece_rows=3)
  assert storage.list_names(f"{bucket}/run") == sorted(content["files"])
  made = table(4)
  sharded.read_files(made, content, f"{bucket}/run", piece_rows=2)
  check_rows(made)
