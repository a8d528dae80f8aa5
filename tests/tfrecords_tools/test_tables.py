import tracemalloc

import numpy as np
import pytest

from facedist import errors
from tfrecords_tools.sources import tables


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
  row_of, values = tables.SortedTable(written(text), 4).of("n1")
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
    *((f"n1/1,1,2,3,{x}\n", "n1/1 has no finite numbers") for x in ("1e39", "-inf")),
    ("n1/1,1,2,3,4\n,1,2,3,4\n", "line 2: the image's name is empty"),
    ("n1/1,1,2,3,4\n.jpg,1,2,3,4\n", "line 2: the image's name is empty"),
    ("n1/1" + ",1" * 9999, r"line 1: a name and 4 numbers .*,1\.\.\.'\.$"),
    ("n1/1,1,2,3,4\nn1/2,1,2,3," + "x" * 9999, r"line 2: could not .*x\.\.\.\.$"),
    ('"' + "x" * 200_000, "not a CSV file"),
    ("n1/1,1,2,3,4\n" + "x" * (1 << 20) + "x\n", "line 2 is longer than 1 MiB"),
    ("n1/1,1,2,3,4\rn1/2,1,2,3,4\n", "not a CSV file"),
    *(
      (f"n1/1,1,2,3,4\n{rest}", "line 2: a quote is not closed")
      for rest in ('"n1/2,1,2,3,4\nn1/3,1,2,3,4\n', '"n1/2,1,2,3,4', 'n1/2,1,2,3,"4\n')
    ),
    ('n1/1,1,2,3,4\n"' + "n1/2,1,2,3,4\n" * 20_000, "line 2: not a CSV .* quote"),
    ("NAME_ID,X,Y,W\n", "NAME_ID and X,Y,W,H, or x1,y1,x2,y2"),
    ("NAME_ID,X,Y,W,H\nn1/1,1,2,3\n", "line 2: 5 columns were expected"),
  ],
)
def test_a_row_or_a_header_that_is_none_is_named_by_its_line(written, text, reason):
  with pytest.raises(errors.DataError, match=reason):
    tables.SortedTable(written(text), 4).of("n1")


@pytest.mark.parametrize(
  ("header", "reason"),
  [
    ("NAME_ID" + ",a" * 10 + "\n", "names no columns .* P1X,P1Y to P5X,P5Y"),
    ("NAME_ID,X,Y,W,H\n", "table.csv: the first line, 'NAME_ID,X,Y,W,H', names"),
  ],
)
def test_a_header_without_landmarks_is_an_error(written, header, reason):
  with pytest.raises(errors.DataError, match=reason):
    tables.SortedTable(written(header), 10).of("n1")


@pytest.mark.parametrize(
  ("header", "row"),
  [
    ("P1X,P1Y,P2X,P2Y,P3X,P3Y,P4X,P4Y,P5X,P5Y", "0,1,10,11,20,21,30,31,40,41"),
    ("x1,x2,x3,x4,x5,y1,y2,y3,y4,y5", "0,10,20,30,40,1,11,21,31,41"),
    ("x0,x1,x2,x3,x4,y0,y1,y2,y3,y4", "0,10,20,30,40,1,11,21,31,41"),
    (
      ",".join(f"landmark_{point}_{axis}" for point in "43210" for axis in "yx"),
      "41,40,31,30,21,20,11,10,1,0",
    ),
    (
      "rightmouth_x,rightmouth_y,leftmouth_x,leftmouth_y,nose_x,nose_y,"
      "righteye_x,righteye_y,lefteye_x,lefteye_y",
      "40,41,30,31,20,21,10,11,0,1",
    ),
  ],
)
@pytest.mark.parametrize(
  ("names", "cells"),
  [
    ("image_id,{}", "n1/1.jpg,{}"),
    ("split,image_id,{}", "train,n1/1.jpg,{}"),
    ("split,image_id,{},det", "train,n1/1.jpg,{},x"),
  ],
)
def test_a_header_says_where_the_landmarks_are(written, header, row, names, cells):
  table = written(f"{names.format(header)}\n{cells.format(row)}\n")
  _, values = tables.SortedTable(table, 10).of("n1")
  assert values.tolist() == [[0, 1, 10, 11, 20, 21, 30, 31, 40, 41]]


@pytest.mark.parametrize(
  "text",
  [
    "NAME_ID,H,W,Y,X\nn1/1,40,30,2,1\n",
    "image_id,x_1,y_1,width,height\nn1/1,1,2,30,40\n",
    "path,x1,y1,x2,y2,score\nn1/1.jpg,1,2,31,42,0.9\n",
    "xmin,xmax,ymin,ymax,filename\n1,31,2,42,n1/1.jpg\n",
  ],
)
def test_a_header_says_where_a_box_is(written, text):
  _, values = tables.SortedTable(written(text), 4).of("n1")
  assert values.tolist() == [[1, 2, 30, 40]]


def test_a_sorted_table_gives_each_identity_its_rows(written):
  table = tables.SortedTable(
    written("X/1,1,2\nn2/2,3,4\nstray,0,0\nn2/1.jpg,5,6\nn-2/1,7,8\nn1/1,9,9\n"), 2
  )
  for identity, rows, numbers in (
    ("X", {"X/1": 0}, [[1, 2]]),
    ("n-2", {"n-2/1": 0}, [[7, 8]]),  # as a path before n1: "-" comes before "1"
    ("n2", {"n2/1": 0, "n2/2": 1}, [[5, 6], [3, 4]]),
    ("n3", {}, []),
  ):
    row_of, values = table.of(identity)
    assert (row_of, values.tolist()) == (rows, numbers)
  empty = tables.SortedTable(written("NAME_ID,X,Y,W,H\n"), 4)
  assert empty.of("n1")[1].shape == (0, 4)


@pytest.mark.parametrize(
  ("text", "names"),
  [
    (
      "Class_ID, Name, Sample_Num, Flag, Gender\n"
      'n1, "Anne,_Princess_Royal", 440, 0, f\nn2, "Julio_César_Chávez,_Jr.", 3, 1, m\n',
      ["Anne,_Princess_Royal", "Julio_César_Chávez,_Jr."],
    ),
    (
      "Class_ID, Name, Flag\nn1, Chávez,_Jr., 1\nn2, Smith, John, Sr., 0\n"
      'n3, Bo, 1,\nn4, "Anne", B, 0\n',
      ["Chávez,_Jr.", "Smith, John, Sr.", "Bo", "Anne,B"],
    ),
    ("Name, Class_ID\nSmith, John, n1\n", ["Smith, John"]),
  ],
)
def test_identity_names_may_hold_accents_and_commas_without_quotes(
  written, text, names
):
  found = tables.read_identity_names(written(text))
  assert found == {f"n{number}": name for number, name in enumerate(names, 1)}


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("id,who\nn1,A\n", "no columns Class_ID and Name"),
    ("Class_ID, Name\nn1\n", "line 2: a column is missing"),
    ("Class_ID, Name\nn1, A\nn1, B\n", "line 3: n1 has a row already"),
    ('Class_ID, Name\nn1, A\nn2, "B\n', "line 3: a quote is not closed"),
  ],
)
def test_another_table_of_identities_is_an_error(written, text, reason):
  with pytest.raises(errors.DataError, match=reason):
    tables.read_identity_names(written(text))


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
  names = ("loose_bb_{}.csv", "bb_landmark/loose_bb_{}.csv")

  def find(given=None):
    folder = f"{tmp_path}/train/"
    return tables.find_beside(folder, given, flag="bounding_boxes", names=names)

  assert find() is None
  (tmp_path / "bb_landmark").mkdir()
  official = tmp_path / "bb_landmark" / "loose_bb_train.csv"
  beside = tmp_path / "loose_bb_train.csv"
  for path in (official, beside):
    path.touch()
    assert find() == str(path)
  assert find("none") is None
  assert find(str(official)) == str(official)
  with pytest.raises(errors.DataError, match=r"--bounding_boxes=/no\.csv does not"):
    find("/no.csv")
