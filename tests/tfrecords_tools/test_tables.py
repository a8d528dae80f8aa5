import tracemalloc

import numpy as np
import pytest

from facedist import errors
from tfrecords_tools import sorted_table, tables


@pytest.fixture
def written(tmp_path):
  def write(text):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)

  return write


@pytest.mark.parametrize(
  "text",
  [
    'NAME_ID,X,Y,W,H\n"n1/0001_01",57,62,82,111\n"n1/0002_01",-3,3.5,1,2\n',
    "n1/0001_01,57,62,82,111\r\nn1/0002_01,-3,3.5,1,2\r\n",
    '\ufeffNAME_ID, X, Y, W, H\n"n1/0001_01" , 57, 62, 82, 111\n\n'
    "n1/0002_01.jpg, -3, 3.5, 1, 2",
  ],
)
def test_names_may_be_quoted_padded_and_have_suffixes(written, text):
  row_of, values = sorted_table.SortedTable(written(text), 4).of("n1")
  assert row_of == {"n1/0001_01": 0, "n1/0002_01": 1}
  np.testing.assert_array_equal(values, [[57, 62, 82, 111], [-3, 3.5, 1, 2]])


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("n1/1,1,2,3\n", "line 1: a name and 4 numbers"),
    ("n1/1,1,2,3,4\nn1/2,1,2,3,nan\n", "line 2: n1/2 has no finite numbers"),
    ("n1/1,1,2,3,4\nn1/2,1,x,3,4\n", "line 2: could not convert string"),
    ("n1/1,1,2,3,4\nn1/1.jpg,1,2,3,4\n", "line 2: n1/1 has a row already"),
    (b"n1/\xff\xfe,1,2,3,4\n", "line 1 is not UTF-8 at its byte 3"),
    ("n1/1,1,2,3,1e39\n", "n1/1 has no finite numbers"),
    ("n1/1,1,2,3,-inf\n", "n1/1 has no finite numbers"),
    ('n1/1,1,2,3,4\n"n1/2,1,2,3,4\nn1/3,1,2,3,4\n', "line 2: a quote is not closed"),
    ("n1/1,1,2,3,4\n,1,2,3,4\n", "line 2: the image's name is empty"),
    ("n1/1,1,2,3,4\n.jpg,1,2,3,4\n", "line 2: the image's name is empty"),
    ("n1/1" + ",1" * 9999, r"line 1: a name and 4 numbers .*,1\.\.\.'\.$"),
    ("n1/1,1,2,3,4\nn1/2,1,2,3," + "x" * 9999, r"line 2: could not .*x\.\.\.\.$"),
    ('"' + "x" * 200_000, "not a CSV file"),
    ("n1/1,1,2,3,4\n" + "x" * (1 << 20) + "x\n", "line 2 is longer than 1 MiB"),
    ("n1/1,1,2,3,4\rn1/2,1,2,3,4\n", "not a CSV file"),
  ],
)
def test_a_row_that_is_none_is_named_by_its_line(written, text, reason):
  with pytest.raises(errors.DataError, match=reason):
    sorted_table.SortedTable(written(text), 4).of("n1")


def test_a_sorted_table_gives_each_identity_its_rows(written):
  table = sorted_table.SortedTable(
    written("X/1,1,2\nn2/2,3,4\nstray,0,0\nn2/1.jpg,5,6\nn-2/1,7,8\nn1/1,9,9\n"), 2
  )
  row_of, values = table.of("X")
  assert (row_of, values.tolist()) == ({"X/1": 0}, [[1, 2]])
  row_of, values = table.of("n-2")  # as a path it comes before n1: "-" before "1"
  assert (row_of, values.tolist()) == ({"n-2/1": 0}, [[7, 8]])
  row_of, values = table.of("n1-")
  assert (row_of, values.shape) == ({}, (0, 2))
  row_of, values = table.of("n2")
  assert (row_of, values.tolist()) == ({"n2/1": 0, "n2/2": 1}, [[5, 6], [3, 4]])
  assert table.of("n3")[0] == {}


def test_an_empty_table_has_no_rows(written):
  table = sorted_table.SortedTable(written("NAME_ID,X,Y,W,H\n"), 4)
  assert table.of("n1")[1].shape == (0, 4)


def test_identity_names_may_hold_commas_and_accents(written):
  path = written(
    "Class_ID, Name, Sample_Num, Flag, Gender\n"
    'n000658, "Anne,_Princess_Royal", 440, 0, f\n'
    'n004462, "Julio_César_Chávez,_Jr.", 314, 1, m\n'
  )
  assert tables.read_identity_names(path) == {
    "n000658": "Anne,_Princess_Royal",
    "n004462": "Julio_César_Chávez,_Jr.",
  }


def test_another_table_of_identities_is_an_error(written):
  with pytest.raises(errors.DataError, match="no columns Class_ID and Name"):
    tables.read_identity_names(written("id,who\nn1,A\n"))
  with pytest.raises(errors.DataError, match="line 2: a column is missing"):
    tables.read_identity_names(written("Class_ID, Name\nn1\n"))
  with pytest.raises(errors.DataError, match="line 3: n1 has a row already"):
    tables.read_identity_names(written("Class_ID, Name\nn1, A\nn1, B\n"))


def test_a_folder_in_a_tables_place_is_an_error(tmp_path):
  with pytest.raises(errors.DataError, match="cannot be read: it is a folder"):
    next(tables.numbers_of(str(tmp_path), 4))


def test_lists_may_have_empty_lines_and_comments(written):
  path = written("# people to leave out\nn000021\r\n\n  n000030 \n")
  assert tables.read_lines(path) == ["n000021", "n000030"]


def test_a_list_in_one_line_is_refused_before_all_of_it_is_read(written):
  path = written("x" * (12 << 20))
  tracemalloc.start()
  with pytest.raises(errors.DataError, match="line 1 is longer than 1 MiB"):
    tables.read_lines(path)
  assert tracemalloc.get_traced_memory()[1] < 11 << 20  # a piece of 4 MiB, joined
  tracemalloc.stop()


def test_a_table_is_found_beside_the_folder_or_below_bb_landmark(tmp_path):
  folder = tmp_path / "train"
  names = ("loose_bb_{}.csv", "bb_landmark/loose_bb_{}.csv")

  def find(given=None):
    return tables.find_beside(f"{folder}/", given, flag="bounding_boxes", names=names)

  assert find() is None
  (tmp_path / "bb_landmark").mkdir()
  official = tmp_path / "bb_landmark" / "loose_bb_train.csv"
  official.touch()
  assert find() == str(official)
  (tmp_path / "loose_bb_train.csv").touch()
  assert find() == str(tmp_path / "loose_bb_train.csv")
  assert find("none") is None
  assert find(str(official)) == str(official)
  with pytest.raises(errors.DataError, match=r"--bounding_boxes=/no\.csv does not"):
    find("/no.csv")
