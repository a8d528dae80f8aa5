"""tfrecords_tools.align with a network of cells in YuNet's place, and with MTCNN."""

import csv
import json
import pathlib
import shutil
import socket
import tarfile
from collections.abc import Callable

import cv2
import numpy as np
import pytest

from facedist import errors, storage
from facedist.data.shards import manifest
from tests import face_model
from tests.tfrecords_tools.conftest import draw_image, jpeg_of
from tests.tfrecords_tools.folders import files_of, records_of, times_of
from tfrecords_tools import align, build, landmarks, synthetic_faces

NO_FACE = "n000002/0003_01"
Align = Callable[..., errors.ExitCode]


@pytest.fixture
def photos(tmp_path: pathlib.Path) -> pathlib.Path:
  """Nine photos of three people, the last one of n000002 without a face."""
  for identity in (1, 2, 7):
    for number in (1, 2, 3):
      image = draw_image(10 * identity + number, 200, 224) // 2
      name = f"n{identity:06d}/{number:04d}_01"
      if name != NO_FACE:
        face_model.paint(image, number, 2)
      path = tmp_path / "photos" / f"{name}.jpg"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(jpeg_of(image))
  return tmp_path / "photos"


@pytest.fixture
def run(tmp_path: pathlib.Path, photos: pathlib.Path) -> Align:
  """Runs the command with one process from the photos to .../faces, with changes."""
  (tmp_path / "cells.onnx").write_bytes(face_model.model())

  def run_with(**changes: object) -> errors.ExitCode:
    values = {
      "input_dir": str(photos),
      "output_dir": str(tmp_path / "faces"),
      "yunet": str(tmp_path / "cells.onnx"),
      "num_processes": 1,
    }
    return align.main(align.AlignConfig(**(values | changes)))

  return run_with


def table(path: pathlib.Path) -> list[list[str]]:
  with path.open(newline="") as stream:
    return list(csv.reader(stream))


def test_the_tables_have_a_row_for_each_face_and_the_rest_is_listed(
  run, photos, tmp_path, caplog
):
  (photos / "n000007" / "0002_01.jpg").write_bytes(b"\xff\xd8 cut off")
  assert run() == errors.ExitCode.PARTIAL
  header, *rows = table(tmp_path / "faces" / "loose_landmark.csv")
  assert ",".join(header) == "NAME_ID,P1X,P1Y,P2X,P2Y,P3X,P3Y,P4X,P4Y,P5X,P5Y"
  assert len(rows) == 7
  for name, *numbers in rows:
    points = np.array(numbers, float).reshape(5, 2)
    expected = face_model.landmarks_of(int(name.split("/")[1][:4]), 2)
    np.testing.assert_allclose(points, expected, atol=1e-3)
  header, *boxes = table(tmp_path / "faces" / "loose_bb.csv")
  assert header == ["NAME_ID", "X", "Y", "W", "H"]
  assert boxes[1] == ["n000001/0002_01", "16", "16", "128", "128"]
  assert table(tmp_path / "faces" / "skipped.csv") == [
    ["path", "reason"],
    [f"{NO_FACE}.jpg", "no face was found"],
    ["n000007/0002_01.jpg", "it is cut off or not an image"],
  ]
  assert "skipped n000007/0002_01.jpg: it is cut off" in caplog.text
  said = json.loads((tmp_path / "faces" / "align.json").read_text())
  assert said == {
    **{"template": "arcface", "detector": said["detector"], "face": "largest"},
    **{"aligned_images": None, "found": 7, "not_found": 1, "unreadable": 1},
    "several_faces": 0,
  }


def test_the_builder_reads_the_table_and_cuts_the_images_that_are_saved(
  run, photos, tmp_path, build_config
):
  run(save_images=True)
  config = build_config(
    photos, landmarks=str(tmp_path / "faces" / "loose_landmark.csv")
  )
  assert build.main(config) == errors.ExitCode.PARTIAL
  made = manifest.load(config.output_dir)
  assert [entry["path"] for entry in made.skipped] == [f"{NO_FACE}.jpg"]
  jpegs = {
    record.filename: bytes(record.jpeg)
    for record in records_of(config.output_dir, "train")
  }
  assert jpegs == files_of(tmp_path / "faces" / "images")


def test_a_run_that_ended_early_continues_and_writes_what_one_in_a_go_does(
  run, photos, tmp_path, monkeypatch
):
  monkeypatch.setattr(landmarks, "IMAGES_A_PART", 2)
  monkeypatch.setattr(landmarks, "_IMAGES_A_TASK", 1)
  whole = photos / "n000007" / "0001_01.jpg"  # the seventh image, in the fourth part
  content = whole.read_bytes()
  whole.write_bytes(b"")
  with pytest.raises(errors.DataError, match=r"n000007/0001_01\.jpg: the file is emp"):
    run(save_images=True, max_bad=0)
  parts = times_of(tmp_path / "faces" / "parts")
  names = [f"part-00000{part}.jsonl" for part in "012"]
  assert sorted(parts) == [*names, "settings.json"]
  whole.write_bytes(content)
  partial = f"0002_01.jpg.partial-{socket.gethostname()}-4194305-0123abcd"  # no process
  (tmp_path / "faces" / "images" / "n000001" / partial).write_bytes(b"half")
  assert run(save_images=True) == errors.ExitCode.PARTIAL
  assert parts.items() <= times_of(tmp_path / "faces" / "parts").items()
  run(save_images=True, output_dir=str(tmp_path / "in_a_go"))
  assert files_of(tmp_path / "faces") == files_of(tmp_path / "in_a_go")


def test_an_image_more_changes_the_parts_from_there_on(
  run, photos, tmp_path, monkeypatch
):
  monkeypatch.setattr(landmarks, "IMAGES_A_PART", 2)
  run()
  before = times_of(tmp_path / "faces" / "parts")
  image = photos / "n000002" / "0002_01.jpg"  # of the third part
  (photos / "n000002" / "0002_02.jpg").write_bytes(image.read_bytes())
  run()
  after = times_of(tmp_path / "faces" / "parts")
  same = {name for name, time in before.items() if after[name] == time}
  assert same == {"settings.json", "part-000000.jsonl", "part-000001.jsonl"}
  assert len(table(tmp_path / "faces" / "loose_landmark.csv")) == 1 + 9


def test_processes_archives_and_lists_give_the_same_tables(run, photos, tmp_path):
  run()
  shutil.rmtree(tmp_path / "faces" / "parts")
  expected = files_of(tmp_path / "faces")
  with tarfile.open(tmp_path / "photos.tar", "w") as archive:
    archive.add(photos, arcname="photos")
  paths = sorted(str(path) for path in photos.rglob("*.jpg"))
  (tmp_path / "list.txt").write_text("\n".join(paths) + "\n")
  for name, changes in {
    "two": {"num_processes": 2},
    "tar": {"input_dir": str(tmp_path / "photos.tar")},
    "list": {"input_dir": None, "input_list": str(tmp_path / "list.txt")},
  }.items():
    run(**changes, output_dir=str(tmp_path / name))
    assert expected.items() <= files_of(tmp_path / name).items()


def test_tables_in_a_bucket_are_those_on_a_disk(run, tmp_path, bucket):
  run(save_images=True)
  run(save_images=True, output_dir=f"{bucket}/aligned")
  for name, content in files_of(tmp_path / "faces").items():
    assert storage.read_bytes(f"{bucket}/aligned/{name}") == content


def test_a_folder_of_other_settings_is_refused(run, tmp_path):
  run()
  before = files_of(tmp_path / "faces")
  for changes in ({"face": "central"}, {"save_images": True}):
    with pytest.raises(errors.ConfigError, match=r"--output_dir=.* other settings"):
      run(**changes)
  assert files_of(tmp_path / "faces") == before


def test_two_images_whose_rows_would_have_one_name_are_refused(run, photos, tmp_path):
  cv2.imwrite(str(photos / "n000001" / "0001_01.png"), draw_image(0))
  with pytest.raises(errors.DataError, match=r"0001_01\.jpg and .*0001_01\.png would"):
    run()
  assert not list((tmp_path / "faces").glob("parts/*"))


def test_tables_are_compared_in_pixels_of_the_aligned_image(run, tmp_path):
  run()
  header, *rows = table(tmp_path / "faces" / "loose_landmark.csv")
  moved = {name: np.array(numbers, float) + 5 * (0, 3) for name, *numbers in rows[:4]}
  moved |= dict.fromkeys((NO_FACE, "elsewhere/1"), np.arange(10) ** 2)
  reference = tmp_path / "reference.csv"
  lines = [header, *([name, *map(str, points)] for name, points in moved.items())]
  reference.write_text("\n".join(map(",".join, lines)) + "\n")
  run(compare_with=str(reference))
  said = json.loads((tmp_path / "faces" / "align.json").read_text())["compared"]
  # The box of 128 pixels is the template's 112: 3 pixels are 3 * 112 / 128.
  for name in ("median_pixels", "p90_pixels"):
    assert said.pop(name) == pytest.approx(2.625, abs=2e-3)
  # The fifth image was not found; the sixth was not given.
  assert said == {"images": 4, "not_found": 0.2, "only_found": 4}
  with pytest.raises(errors.UsageError, match="--compare_with=nowhere does not exist"):
    run(compare_with="nowhere")


def test_mtcnn_finds_drawn_faces_where_they_were_drawn(tmp_path):
  few = {"lfw_identities": 20, "lfw_images_per_identity": 2, "lfw_pairs_per_fold": 1}
  synthetic_faces.main(
    synthetic_faces.FacesConfig(
      str(tmp_path), num_identities=3, images_per_identity=2, **few
    )
  )
  drawn = tmp_path / "vggface2"
  settings = align.AlignConfig(
    input_dir=str(drawn / "train"),
    output_dir=str(tmp_path / "faces"),
    compare_with=str(drawn / "loose_landmark_train.csv"),
    num_processes=1,
  )
  align.main(settings)
  said = json.loads((tmp_path / "faces" / "align.json").read_text())
  assert said["detector"].startswith("mtcnn 1.")
  assert said["found"] + said["not_found"] == 6
  assert said["found"] >= 4
  assert said["compared"]["median_pixels"] < 5
