"""Names, tables and pairs of drawn faces."""

import itertools

import numpy as np
import pytest

from facedist import errors
from tfrecords_tools.synthetic import face_layout
from tfrecords_tools.synthetic.face_layout import FacePair, Faces

FACES = Faces(
  names=("n000001/0001_01",),
  landmarks=np.float32([[[1, 2], [3.5, 4], [5, 6], [7, 8], [9, 10.25]]]),
  boxes=np.array([[-1, 2, 30, 40]]),
)


def test_landmarks_are_written_as_vggface2_writes_them():
  assert face_layout.landmark_table([FACES]) == (
    "NAME_ID,P1X,P1Y,P2X,P2Y,P3X,P3Y,P4X,P4Y,P5X,P5Y\n"
    '"n000001/0001_01",1.0000,2.0000,3.5000,4.0000,5.0000,6.0000,7.0000,8.0000,'
    "9.0000,10.2500\n"
  )


def test_boxes_and_lists_are_written_as_vggface2_writes_them():
  assert face_layout.box_table([FACES]) == (
    'NAME_ID,X,Y,W,H\n"n000001/0001_01",-1,2,30,40\n'
  )
  assert face_layout.image_list([FACES]) == "n000001/0001_01.jpg\n"


def test_identities_are_written_as_vggface2_writes_them():
  assert face_layout.identity_table([("n000001", "Tavo_Merlund", 20, "m")]) == (
    'Class_ID, Name, Sample_Num, Flag, Gender\nn000001, "Tavo_Merlund", 20, 1, m\n'
  )


def test_pairs_are_written_as_lfw_writes_them():
  folds = [[FacePair((0, 1), (0, 4)), FacePair((0, 2), (1, 3))]]
  assert face_layout.pairs_text(folds, ["Ann_A", "Bo_B"]) == (
    "1\t1\nAnn_A\t1\t4\nAnn_A\t2\tBo_B\t3\n"
  )


def test_every_name_is_used_once():
  names = {face_layout.person_name(number) for number in range(40_000)}
  assert len(names) == 40_000
  assert not any(character in name for name in names for character in ' ,"\t/')


def test_pairs_are_all_different_and_no_one_is_in_two_folds():
  folds = face_layout.choose_pairs(
    np.random.default_rng(1), num_people=31, num_images=3, num_pairs=9
  )
  assert len(folds) == 10
  people_of_folds = []
  for pairs in folds:
    kinds = [pair.first[0] == pair.second[0] for pair in pairs]
    assert kinds == [True] * 9 + [False] * 9
    assert len({frozenset((pair.first, pair.second)) for pair in pairs}) == 18
    images = [image for pair in pairs for image in (pair.first, pair.second)]
    assert all(0 <= person < 31 and 1 <= number <= 3 for person, number in images)
    people_of_folds.append({person for person, _ in images})
  for one, other in itertools.combinations(people_of_folds, 2):
    assert not one & other


def test_more_pairs_than_there_are_is_an_error_with_the_figures():
  with pytest.raises(
    errors.UsageError, match=r"fold=7: 2 people .* 3 images .* 6 pairs"
  ):
    face_layout.choose_pairs(
      np.random.default_rng(1), num_people=20, num_images=3, num_pairs=7
    )
