import dataclasses

import numpy as np
import pytest

from facedist import errors
from facedist.data import alignment
from tfrecords_tools.sources import base, listing, vggface2


@dataclasses.dataclass(frozen=True)
class Read:
  """A source whose images were taken."""

  paths: list[str]
  places: np.ndarray
  geometry: np.ndarray
  images: base.Source


def read(folder, **changes):
  values = {
    "landmarks": str(folder.parent / "loose_landmark_train.csv"),
    "bounding_boxes": None,
    "identity_meta": None,
    "missing_row": "skip",
  } | changes
  folder = str(folder)
  images = vggface2.read(listing.list_images(folder), **values)
  groups = list(images.groups)
  rows = np.concatenate([group.rows for group in groups])
  paths = [path for group in groups for path in group.paths]
  return Read(paths, rows["place"], rows["geometry"], images)


@pytest.fixture
def without_row(vggface2_dir):
  """The folder with no landmarks for n000003/0002_01.jpg."""
  path = vggface2_dir.parent / "loose_landmark_train.csv"
  rows = path.read_text().splitlines()
  kept = [row for row in rows if '"n000003/0002_01"' not in row]
  path.write_text("\n".join(kept))
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
  images = read(vggface2_dir)
  assert images.paths == [
    *(f"n000001/000{number}_01.jpg" for number in (1, 2, 3)),
    *(f"n000003/000{number}_01.jpg" for number in (1, 2, 3, 4)),
    "n000007/0001_01.jpg",
  ]
  assert set(images.places) == {alignment.Place.LANDMARKS}
  first = [22, 30, 42, 30.5, 32, 42, 24, 54, 41, 53.5]
  np.testing.assert_array_equal(images.geometry[0], first)


def test_excluded_identities_are_left_out_and_told(vggface2_dir):
  images = read(vggface2_dir, excluded={"n000003", "n000042"})
  assert {path.split("/")[0] for path in images.paths} == {"n000001", "n000007"}
  assert images.images.excluded == ["n000003"]


def test_names_of_the_identities_are_known(vggface2_dir):
  images = read(
    vggface2_dir, identity_meta=str(vggface2_dir.parent / "identity_meta.csv")
  )
  assert images.images.identity_names == {
    "n000001": "Ada_Lovelace",
    "n000003": "Anne,_Princess_Royal",
    "n000099": "Somebody_Else",
  }


def test_an_image_without_a_row_is_left_out_and_told(without_row):
  images = read(without_row)
  assert len(images.paths) == 7
  assert images.images.skipped == [
    {
      "path": "n000003/0002_01.jpg",
      "reason": "no row in loose_landmark_train.csv",
    }
  ]


def test_an_image_without_a_row_ends_the_build_if_told_so(without_row):
  with pytest.raises(errors.DataError, match=r"no row for 1 images.*n000003/0002_01"):
    read(without_row, missing_row="fail")


def test_more_images_without_a_row_than_a_manifest_can_name_end_the_build(
  without_row, monkeypatch
):
  monkeypatch.setattr(base, "MAX_SKIPPED", 1)
  assert len(read(without_row).images.skipped) == 1
  monkeypatch.setattr(base, "MAX_SKIPPED", 0)
  with pytest.raises(errors.DataError, match=r"more than 0 images, such as n000003/00"):
    read(without_row)


def test_an_image_without_a_row_is_cut_from_the_centre_if_told_so(without_row):
  images = read(without_row, missing_row="crop")
  row = images.paths.index("n000003/0002_01.jpg")
  assert images.places[row] == alignment.Place.UNKNOWN
  assert (np.delete(images.places, row) == alignment.Place.LANDMARKS).all()


def test_an_image_without_landmarks_is_cut_by_its_box_if_told_so(without_row, boxes):
  images = read(without_row, missing_row="crop", bounding_boxes=boxes)
  row = images.paths.index("n000003/0002_01.jpg")
  assert images.places[row] == alignment.Place.BOX
  assert images.geometry[row].tolist() == [5, 6, 30, 40, 0, 0, 0, 0, 0, 0]
  assert images.places[0] == alignment.Place.LANDMARKS


def test_boxes_decide_where_there_are_no_landmarks(vggface2_dir, boxes):
  images = read(vggface2_dir, landmarks=None, bounding_boxes=boxes)
  assert images.paths == ["n000001/0001_01.jpg", "n000003/0002_01.jpg"]
  assert set(images.places) == {alignment.Place.BOX}
  assert len(images.images.skipped) == 6


def test_without_tables_every_face_is_in_the_centre(vggface2_dir):
  images = read(vggface2_dir, landmarks=None, missing_row="fail")
  assert set(images.places) == {alignment.Place.UNKNOWN}
  assert len(images.paths) == 8


def test_a_table_of_another_folder_is_an_error(vggface2_dir):
  path = vggface2_dir.parent / "loose_landmark_train.csv"
  path.write_text(path.read_text().replace("n0000", "n0001"))
  with pytest.raises(errors.DataError, match="has no row for any of the 8 images"):
    read(vggface2_dir)
