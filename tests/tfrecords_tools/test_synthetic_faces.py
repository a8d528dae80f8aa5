"""Drawn faces as data sets: formats, reproducibility, difficulty, and refusals."""

import dataclasses
import pathlib
import re

import cv2
import numpy as np
import pytest

from facedist import errors, storage
from facedist.data import alignment
from facedist.data.shards import manifest
from facedist.evaluation import verification
from tfrecords_tools import build, synthetic_faces
from tfrecords_tools.builder import options
from tfrecords_tools.sources import lfw, tables
from tfrecords_tools.synthetic import population
from tfrecords_tools.synthetic_faces import FacesConfig

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


def content(folder: pathlib.Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


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
  meta = (vggface2 / "identity_meta.csv").read_text().splitlines()
  assert meta[0] == "Class_ID, Name, Sample_Num, Flag, Gender"
  assert re.fullmatch(r'n000001, "[A-Z][a-z]+_[A-Z][a-z]+", 2, 1, [mf]', meta[1])
  rows = (vggface2 / "loose_landmark_train.csv").read_text().splitlines()
  assert rows[0] == "NAME_ID,P1X,P1Y,P2X,P2Y,P3X,P3Y,P4X,P4Y,P5X,P5Y"
  assert [row.split(",")[0] for row in rows[1:]] == [f'"{name}"' for name in names]
  assert all(len(row.split(",")) == 11 for row in rows)
  boxes = (vggface2 / "loose_bb_train.csv").read_text().splitlines()
  assert boxes[0] == "NAME_ID,X,Y,W,H"
  assert all(int(number) == float(number) for number in boxes[1].split(",")[1:])


def numbers_in(path: pathlib.Path, columns: int) -> dict[str, np.ndarray]:
  """Returns float32[columns] by image of a table."""
  rows = tables.numbers_of(str(path), columns)
  return {name: np.frombuffer(numbers, "<f4") for name, _, numbers in rows}


def test_landmarks_lie_in_the_box_and_the_box_meets_the_image(tiny: pathlib.Path):
  vggface2 = tiny / "vggface2"
  boxes = numbers_in(vggface2 / "loose_bb_train.csv", 4)
  for name, numbers in numbers_in(vggface2 / "loose_landmark_train.csv", 10).items():
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


def test_the_builder_takes_both_sets_as_they_are(
  tiny: pathlib.Path, tmp_path: pathlib.Path
):
  for dataset, folder in (("vggface2", "vggface2/train"), ("lfw", "lfw/images")):
    build.main(
      options.BuildConfig(
        dataset=dataset,
        input_dir=str(tiny / folder),
        output_dir=str(tmp_path / dataset),
        image_size=48,
        num_processes=1,
      )
    )
  training = manifest.load(str(tmp_path / "vggface2"))
  assert training.identities == ("n000001", "n000002", "n000003")
  assert training.splits["train"].records == 6
  verified = manifest.load(str(tmp_path / "lfw"))
  assert verified.pairs is not None
  assert (verified.pairs.pairs, verified.pairs.folds) == (40, 10)


@pytest.mark.slow
def test_the_number_of_processes_changes_no_byte(
  tiny: pathlib.Path, tmp_path: pathlib.Path
):
  synthetic_faces.main(in_folder(tmp_path, num_processes=2))
  assert content(tmp_path) == content(tiny)


def test_another_seed_draws_other_people(tiny: pathlib.Path, tmp_path: pathlib.Path):
  synthetic_faces.main(in_folder(tmp_path, seed=8))
  first = "vggface2/train/n000001/0001_01.jpg"
  assert content(tmp_path)[first] != content(tiny)[first]


def test_more_people_and_images_leave_the_others_as_they_were(
  tiny: pathlib.Path, tmp_path: pathlib.Path
):
  synthetic_faces.main(in_folder(tmp_path, num_identities=4, images_per_identity=3))
  more, fewer = content(tmp_path), content(tiny)
  images = [name for name in fewer if name.endswith(".jpg")]
  assert {name: more[name] for name in images} == {name: fewer[name] for name in images}


def test_an_image_drawn_alone_is_the_one_of_the_set(tiny: pathlib.Path):
  person = population.training_person(1, images=2, root="", image_size=64, seed=7)
  drawing, jpeg = population.draw_image(person, population.identity_of(person), 1)
  path = tiny / "vggface2" / "train" / "n000002" / "0002_01.jpg"
  assert jpeg == path.read_bytes()
  table = numbers_in(tiny / "vggface2" / "loose_landmark_train.csv", 10)
  in_table = table["n000002/0002_01"].reshape(5, 2)
  np.testing.assert_allclose(in_table, drawing.landmarks, atol=1e-4)


def test_a_second_start_has_nothing_to_do(tmp_path: pathlib.Path):
  synthetic_faces.main(in_folder(tmp_path))
  image = tmp_path / "vggface2" / "train" / "n000001" / "0001_01.jpg"
  image.write_bytes(b"mine")
  synthetic_faces.main(in_folder(tmp_path))
  assert image.read_bytes() == b"mine"


def test_a_start_after_a_kill_finishes_the_set(
  tiny: pathlib.Path, tmp_path: pathlib.Path
):
  synthetic_faces.main(in_folder(tmp_path))
  (tmp_path / "lfw" / "pairs.txt").unlink()
  (tmp_path / "vggface2" / "train" / "n000003" / "0002_01.jpg").write_bytes(b"half")
  synthetic_faces.main(in_folder(tmp_path))
  assert content(tmp_path) == content(tiny)


def test_a_folder_with_faces_of_other_settings_is_refused(tiny: pathlib.Path):
  before = content(tiny)
  with pytest.raises(errors.UsageError, match="other settings"):
    synthetic_faces.main(in_folder(tiny, images_per_identity=5))
  assert content(tiny) == before


def test_a_folder_with_something_else_is_refused(tmp_path: pathlib.Path):
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(errors.UsageError, match="not empty"):
    synthetic_faces.main(in_folder(tmp_path))
  assert list(content(tmp_path)) == ["thesis.txt"]


def test_faces_are_drawn_into_a_bucket(bucket: str, tiny: pathlib.Path):
  synthetic_faces.main(in_folder(f"{bucket}/drawn"))
  for name in ("vggface2/train/n000002/0001_01.jpg", "lfw/pairs.txt"):
    assert storage.read_bytes(f"{bucket}/drawn/{name}") == (tiny / name).read_bytes()


def test_raw_pixels_are_better_than_chance_and_far_from_enough():
  num_people, num_images, num_pairs = 60, 4, 400
  pixels = []
  for number in range(num_people):
    person = population.unseen_person(
      number, images=num_images, root="", image_size=128, seed=0
    )
    identity = population.identity_of(person)
    for image in range(num_images):
      drawing, _ = population.draw_image(person, identity, image)
      warp = alignment.warp_to_template(drawing.landmarks, size=48)
      pixels.append(alignment.align(drawing.image, warp, size=48))
  embeddings = np.float32(pixels).reshape(num_people, num_images, -1)
  embeddings -= embeddings.mean(axis=2, keepdims=True)
  embeddings /= np.linalg.norm(embeddings, axis=2, keepdims=True)
  rng = np.random.default_rng(0)
  first, second = (rng.integers(num_people, size=num_pairs) for _ in range(2))
  same = np.arange(num_pairs) % 2 == 0
  second = np.where(same, first, second + (first == second) * (1 - 2 * (first > 0)))
  scores = np.sum(embeddings[first, 0] * embeddings[second, 1], axis=1)
  folds = np.arange(num_pairs) % 10
  accuracy = verification.verify(scores, same, folds).accuracy_mean
  assert 0.53 < accuracy < 0.85
