import pytest

from facedist import errors
from facedist.data.alignment import Place
from tfrecords_tools.sources import base, listing, vggface2

POINTS = (22, 30, 42, 30.5, 32, 42, 24, 54, 41, 53.5)  # LANDMARKS of conftest.py
UNLISTED = "n000003/0002_01.jpg"


def read(folder, **changes):
  """Returns the source, and each image's place and its numbers."""
  values = {
    "landmarks": str(folder.parent / "loose_landmark_train.csv"),
    "bounding_boxes": None,
    "identity_meta": None,
    "missing_row": "skip",
  } | changes
  source = vggface2.read(listing.list_images(str(folder)), **values)
  found = {
    path: (row["place"], tuple(row["geometry"].tolist()))
    for group in source.groups
    for path, row in zip(group.paths, group.rows, strict=True)
  }
  return source, found


@pytest.fixture
def without_row(vggface2_dir):
  """The folder with no landmarks for UNLISTED."""
  path = vggface2_dir.parent / "loose_landmark_train.csv"
  path.write_text(path.read_text().replace(UNLISTED[:-4], "n000003/other"))
  return vggface2_dir


@pytest.fixture
def boxes(vggface2_dir):
  """Boxes for two images."""
  path = vggface2_dir.parent / "loose_bb_train.csv"
  path.write_text(
    'NAME_ID,X,Y,W,H\n"n000003/0002_01",5,6,30,40\n"n000001/0001_01",7,8,31,41\n'
  )
  return str(path)


def test_images_are_sorted_and_have_their_landmarks(vggface2_dir):
  _, found = read(vggface2_dir)
  assert list(found) == [
    *(f"n000001/000{number}_01.jpg" for number in (1, 2, 3)),
    *(f"n000003/000{number}_01.jpg" for number in (1, 2, 3, 4)),
    "n000007/0001_01.jpg",
  ]
  assert set(found.values()) == {(Place.LANDMARKS, POINTS)}


def test_excluded_identities_are_left_out_and_told(vggface2_dir):
  source, found = read(vggface2_dir, excluded={"n000003", "n000042"})
  assert {path.split("/")[0] for path in found} == {"n000001", "n000007"}
  assert source.excluded == ["n000003"]


def test_names_of_the_identities_are_known(vggface2_dir):
  meta = str(vggface2_dir.parent / "identity_meta.csv")
  assert read(vggface2_dir, identity_meta=meta)[0].identity_names == {
    "n000001": "Ada_Lovelace",
    "n000003": "Anne,_Princess_Royal",
    "n000099": "Somebody_Else",
  }


def test_an_image_without_a_row_is_left_out_and_told(without_row):
  source, found = read(without_row)
  assert len(found) == 7
  reason = "no row in loose_landmark_train.csv"
  assert source.skipped == [{"path": UNLISTED, "reason": reason}]


def test_an_image_without_a_row_ends_the_build_if_told_so(without_row):
  with pytest.raises(errors.DataError, match=f"no row for 1 images.*{UNLISTED[:-4]}"):
    read(without_row, missing_row="fail")


def test_more_images_without_a_row_than_a_manifest_can_name_end_the_build(
  without_row, monkeypatch
):
  monkeypatch.setattr(base, "MAX_SKIPPED", 1)
  assert len(read(without_row)[0].skipped) == 1
  monkeypatch.setattr(base, "MAX_SKIPPED", 0)
  with pytest.raises(errors.DataError, match=r"more than 0 images, such as n000003/00"):
    read(without_row)


def test_an_image_without_a_row_is_cut_by_its_box_or_from_the_centre_if_told_so(
  without_row, boxes
):
  _, found = read(without_row, missing_row="crop")
  assert found.pop(UNLISTED)[0] == Place.UNKNOWN
  assert {place for place, _ in found.values()} == {Place.LANDMARKS}
  _, found = read(without_row, missing_row="crop", bounding_boxes=boxes)
  assert found.pop(UNLISTED) == (Place.BOX, (5, 6, 30, 40, 0, 0, 0, 0, 0, 0))
  assert {place for place, _ in found.values()} == {Place.LANDMARKS}


def test_boxes_decide_where_there_are_no_landmarks(vggface2_dir, boxes):
  source, found = read(vggface2_dir, landmarks=None, bounding_boxes=boxes)
  assert list(found) == ["n000001/0001_01.jpg", UNLISTED]
  assert {place for place, _ in found.values()} == {Place.BOX}
  assert len(source.skipped) == 6


def test_without_tables_every_face_is_in_the_centre(vggface2_dir):
  _, found = read(vggface2_dir, landmarks=None, missing_row="fail")
  assert [place for place, _ in found.values()] == [Place.UNKNOWN] * 8


def test_a_table_of_another_folder_is_an_error(vggface2_dir):
  path = vggface2_dir.parent / "loose_landmark_train.csv"
  path.write_text(path.read_text().replace("n0000", "n0001"))
  with pytest.raises(errors.DataError, match="has no row for any of the 8 images"):
    read(vggface2_dir)
