"""Drawn faces as data sets: formats, reproducibility, difficulty, and refusals."""

import dataclasses
import itertools
import pathlib
import re
import shutil

import cv2
import numpy as np
import pytest

from facedist import errors, storage
from facedist.data import alignment
from facedist.data.shards import manifest
from facedist.evaluation import verification
from tests.tfrecords_tools.conftest import LANDMARK_HEADER
from tests.tfrecords_tools.folders import files_of
from tfrecords_tools import build, synthetic_faces
from tfrecords_tools.sources import lfw, tables
from tfrecords_tools.synthetic import face_layout, population
from tfrecords_tools.synthetic_faces import FacesConfig

META_ROW = r'n000001, "[A-Z][a-z]+_[A-Z][a-z]+", 2, 1, [mf]'
TINY = FacesConfig(
  output_dir="",
  num_identities=3,
  images_per_identity=2,
  lfw_identities=20,
  lfw_images_per_identity=3,
  lfw_pairs_per_fold=2,
  image_size=64,
  seed=7,
  num_processes=1,
)


def in_folder(folder: pathlib.Path | str, **changes: int) -> FacesConfig:
  return dataclasses.replace(TINY, output_dir=str(folder), **changes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("faces")
  synthetic_faces.main(in_folder(folder))
  return folder


def test_training_set_lies_in_vggface2s_layout(tiny: pathlib.Path):
  vggface2 = tiny / "vggface2"
  names = [f"n{person:06d}/000{image}_01" for person in (1, 2, 3) for image in (1, 2)]
  assert (vggface2 / "train_list.txt").read_text().split() == [
    f"{name}.jpg" for name in names
  ]
  for name in names:
    assert cv2.imread(str(vggface2 / "train" / f"{name}.jpg")) is not None
  for table, header, row in (
    ("identity_meta", "Class_ID, Name, Sample_Num, Flag, Gender", META_ROW),
    ("loose_landmark_train", LANDMARK_HEADER, r'"n000001/0001_01"(,-?\d+\.\d{4}){10}'),
    ("loose_bb_train", "NAME_ID,X,Y,W,H", r'"n000001/0001_01"(,-?\d+){4}'),
  ):
    found = (vggface2 / f"{table}.csv").read_text().splitlines()
    assert found[0] == header
    assert re.fullmatch(row, found[1])


def numbers_in(path: pathlib.Path, columns: int) -> dict[str, np.ndarray]:
  """Returns float32[columns] by image of a table."""
  rows = tables.numbers_of(str(path), columns)
  return {name: np.frombuffer(numbers, "<f4") for name, _, numbers in rows}


def test_landmarks_lie_in_the_box_and_the_box_meets_the_image(tiny: pathlib.Path):
  vggface2 = tiny / "vggface2"
  boxes = numbers_in(vggface2 / "loose_bb_train.csv", 4)
  landmarks = numbers_in(vggface2 / "loose_landmark_train.csv", 10)
  assert list(landmarks) == list(boxes)
  assert len(boxes) == 6
  for name, numbers in landmarks.items():
    points = numbers.reshape(5, 2)
    x, y, width, height = boxes[name]
    assert (points > (x, y)).all()
    assert (points < (x + width, y + height)).all()
    rows, columns = cv2.imread(str(vggface2 / "train" / f"{name}.jpg")).shape[:2]
    assert (points >= 0).all()
    assert (points < (columns, rows)).all()


def test_lfw_set_lies_in_lfws_layout_with_ten_folds(tiny: pathlib.Path):
  text = (tiny / "lfw" / "pairs.txt").read_text()
  assert text.startswith("10\t2\n")
  pairs = lfw.read_pairs(str(tiny / "lfw" / "pairs.txt"))
  assert [pair.fold for pair in pairs] == [fold for fold in range(10) for _ in range(4)]
  for pair in pairs:
    folders = {image.partition("/")[0] for image in (pair.first, pair.second)}
    assert pair.same == (len(folders) == 1)
    for image in (pair.first, pair.second):
      path = tiny / "lfw" / "images" / f"{image}.jpg"
      assert cv2.imread(str(path)).shape == (64, 64, 3)


def test_no_one_is_in_both_sets(tiny: pathlib.Path):
  names = tables.read_identity_names(str(tiny / "vggface2" / "identity_meta.csv"))
  unseen = {path.name for path in (tiny / "lfw" / "images").iterdir()}
  assert len(unseen) == 20
  assert not unseen & set(names.values())


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
  message = r"fold=7: 2 people .* 3 images .* 6 pairs"
  with pytest.raises(errors.UsageError, match=message):
    face_layout.choose_pairs(
      np.random.default_rng(1), num_people=20, num_images=3, num_pairs=7
    )


def test_the_builder_takes_both_sets_as_they_are(
  tiny: pathlib.Path, tmp_path: pathlib.Path, build_config
):
  config = build_config(tiny / "vggface2" / "train", image_size=48)
  build.main(config)
  training = manifest.load(config.output_dir)
  assert training.identities == ("n000001", "n000002", "n000003")
  assert training.splits["train"].records == 6
  config = build_config(
    tiny / "lfw" / "images", dataset="lfw", output_dir=f"{tmp_path}/lfw"
  )
  build.main(config)
  verified = manifest.load(config.output_dir)
  assert verified.pairs is not None
  assert (verified.pairs.pairs, verified.pairs.folds) == (40, 10)


@pytest.mark.slow
def test_the_number_of_processes_changes_no_byte(
  tiny: pathlib.Path, tmp_path: pathlib.Path
):
  synthetic_faces.main(in_folder(tmp_path, num_processes=2))
  assert files_of(tmp_path) == files_of(tiny)


def test_another_seed_draws_other_people(tiny: pathlib.Path, tmp_path: pathlib.Path):
  synthetic_faces.main(in_folder(tmp_path, seed=8))
  first = "vggface2/train/n000001/0001_01.jpg"
  assert (tmp_path / first).read_bytes() != (tiny / first).read_bytes()


def test_more_people_and_images_leave_the_others_as_they_were(
  tiny: pathlib.Path, tmp_path: pathlib.Path
):
  synthetic_faces.main(in_folder(tmp_path, num_identities=4, images_per_identity=3))
  fewer = {item for item in files_of(tiny).items() if item[0].endswith(".jpg")}
  assert fewer <= files_of(tmp_path).items()


def test_an_image_drawn_alone_is_the_one_of_the_set(tiny: pathlib.Path):
  person = population.training_person(1, images=2, root="", image_size=64, seed=7)
  drawing, jpeg = population.draw_image(person, population.identity_of(person), 1)
  path = tiny / "vggface2" / "train" / "n000002" / "0002_01.jpg"
  assert jpeg == path.read_bytes()
  table = numbers_in(tiny / "vggface2" / "loose_landmark_train.csv", 10)
  in_table = table["n000002/0002_01"].reshape(5, 2)
  np.testing.assert_allclose(in_table, drawing.landmarks, atol=1e-4)


def test_a_start_after_a_kill_finishes_the_set_and_after_the_end_does_nothing(
  tiny: pathlib.Path, tmp_path: pathlib.Path
):
  shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
  image = tmp_path / "vggface2" / "train" / "n000003" / "0002_01.jpg"
  image.write_bytes(b"half")
  synthetic_faces.main(in_folder(tmp_path))
  assert image.read_bytes() == b"half"
  (tmp_path / "lfw" / "pairs.txt").unlink()
  synthetic_faces.main(in_folder(tmp_path))
  assert files_of(tmp_path) == files_of(tiny)


def test_a_folder_with_faces_of_other_settings_is_refused(tiny: pathlib.Path):
  before = files_of(tiny)
  with pytest.raises(errors.UsageError, match="other settings"):
    synthetic_faces.main(in_folder(tiny, images_per_identity=5))
  assert files_of(tiny) == before


def test_a_folder_with_something_else_is_refused(tmp_path: pathlib.Path):
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(errors.UsageError, match="not empty"):
    synthetic_faces.main(in_folder(tmp_path))
  assert list(files_of(tmp_path)) == ["thesis.txt"]


def test_faces_are_drawn_into_a_bucket(bucket: str, tiny: pathlib.Path):
  synthetic_faces.main(in_folder(f"{bucket}/drawn"))
  for name in ("vggface2/train/n000002/0001_01.jpg", "lfw/pairs.txt"):
    assert storage.read_bytes(f"{bucket}/drawn/{name}") == (tiny / name).read_bytes()


def test_raw_pixels_are_better_than_chance_and_far_from_enough():
  num_people = 100
  pixels = np.empty((num_people, 2, 48 * 48 * 3), np.float32)
  for number in range(num_people):
    person = population.unseen_person(number, images=2, root="", image_size=128, seed=0)
    identity = population.identity_of(person)
    for image in range(2):
      drawing, _ = population.draw_image(person, identity, image)
      warp = alignment.warp_to_template(drawing.landmarks, size=48)
      pixels[number, image] = alignment.align(drawing.image, warp, size=48).ravel()
  pixels -= pixels.mean(axis=2, keepdims=True)
  pixels /= np.linalg.norm(pixels, axis=2, keepdims=True)
  first, second = pixels[:, 0], pixels[:, 1]
  others = np.roll(second, 1, axis=0)
  scores = np.sum([first * second, first * others], axis=2).ravel()
  same, folds = np.repeat([True, False], num_people), np.arange(2 * num_people) % 10
  accuracy = verification.verify(scores, same, folds).accuracy_mean
  assert 0.53 < accuracy < 0.85
