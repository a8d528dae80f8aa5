"""facedist.compare with a linear network and the score log of a run."""

import json
import pathlib
from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from facedist import compare, errors
from facedist.data import alignment
from tests import face_model
from tests.facedist import pixel_runs
from tests.facedist.pixel_runs import SIZE


@pytest.fixture(scope="module", autouse=True)
def _backbone() -> Iterator[None]:
  with pixel_runs.backbone():
    yield


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> str:
  """A run of one checkpoint, scored on two sets."""
  folder = pixel_runs.start(tmp_path / "run")
  pixel_runs.save(folder, 7)
  _log(tmp_path, _row(), _row(set="cfp", tar_at_far=[_at(0.1, 0.99)]))
  return folder


def _at(far: float, threshold: float) -> dict:
  return {"far": far, "tar": 1.0, "low": None, "high": None, "threshold": threshold}


def _row(**changes: object) -> dict:
  points = [_at(0.1, 0.5), _at(0.01, 0.97)]
  row = {"step": 7, "set": "lfw", "mirrored": False, "weights": "trained"}
  return row | {"tar_at_far": points} | changes


def _log(folder: pathlib.Path, *rows: dict) -> None:
  lines = [json.dumps(row) + "\n" for row in rows]
  (folder / "run" / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture
def images(tmp_path: pathlib.Path) -> tuple[str, str]:
  """Two images whose embeddings are (3, 4) and (4, 3): a cosine of 24 / 25."""
  return (
    pixel_runs.write_image(tmp_path / "a.png", left=30, right=40),
    pixel_runs.write_image(tmp_path / "b.png", left=40, right=30),
  )


def _run(images: tuple[str, str], workdir: str, **changes: object) -> int:
  values = {"set_name": "lfw", "mirror": False} | changes
  return compare.main(compare.CompareConfig(*images, workdir, **values))


def test_the_threshold_is_that_of_the_rate_in_the_score_log(workdir, images, capsys):
  assert _run(images, workdir, far=0.1) == errors.ExitCode.DONE
  assert capsys.readouterr().out == (
    "same: cosine 0.9600 >= threshold 0.5000 (at most 0.1 of the different pairs of "
    "lfw are accepted), step 7\n"
  )
  assert _run(images, workdir, far=0.01) == errors.ExitCode.DONE
  assert capsys.readouterr().out.startswith("different: cosine 0.9600 < threshold 0.97")


def test_json_holds_the_same_and_a_threshold_of_ones_own_has_no_rate(
  workdir, images, capsys
):
  _run(images, workdir, json=True, far=0.1, set_name="cfp")
  said = json.loads(capsys.readouterr().out)
  assert said.pop("cosine") == pytest.approx(0.96)
  text = """{
    "same": false, "threshold": 0.99, "far": 0.1, "set": "cfp", "step": 7,
    "model": "pixels-2@step-00000007", "alignment": null
  }"""
  assert said == json.loads(text)
  _run(images, workdir, threshold=0.9)
  assert "same: cosine 0.9600 >= threshold 0.9000 (whose" in capsys.readouterr().out


def test_with_the_mirror_image_both_are_alike(workdir, images, tmp_path, capsys):
  _log(tmp_path, _row(mirrored=True))
  _run(images, workdir, mirror=True, far=0.01, set_name=None)
  assert "same: cosine 1.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"set_name": None}, r"several sets; choose one with --set_name=cfp\|lfw"),
    ({"set_name": "x"}, r"--set_name=x is not known; choose one of cfp, lfw"),
    ({"far": 1e-4}, r"--far=0\.0001 is not a rate that lfw supports; choose .* 0\.01"),
  ],
)
def test_a_choice_that_the_score_log_lacks_is_named(workdir, images, changes, said):
  with pytest.raises(errors.UsageError, match=said):
    _run(images, workdir, **changes)


@pytest.mark.parametrize(
  ("row", "said"),
  [
    (_row(step=6), r"no score of step 7 .* facedist\.evaluate --workdir="),
    (_row(mirrored=True), r"no score of step 7 with trained weights and mirror=False"),
    (_row(weights="ema"), "no score of step 7 with trained weights"),
    (_row(tar_at_far=[{"far": 0.1, "tar": 1.0}]), "no thresholds of lfw"),
    (_row(tar_at_far=[]), "no thresholds of lfw"),
  ],
)
def test_a_run_without_a_threshold_says_how_to_get_one(
  workdir, images, tmp_path, row, said
):
  _log(tmp_path, row)
  with pytest.raises(errors.DataError, match=rf"{said}.* give --threshold"):
    _run(images, workdir)


def test_a_line_that_is_being_written_is_left_out_and_others_are_errors(
  workdir, images, tmp_path
):
  path = tmp_path / "run" / "metrics.jsonl"
  path.write_text(json.dumps(_row()) + '\n{"step": 8, ')
  assert _run(images, workdir, far=0.1) == errors.ExitCode.DONE
  path.write_text('{"step": 8, \n' + json.dumps(_row()) + "\n")
  with pytest.raises(errors.DataError, match="line 1 is not a JSON object"):
    _run(images, workdir, far=0.1)


def test_an_image_that_is_not_aligned_is_refused_with_the_fix(
  workdir, images, tmp_path
):
  photo = str(tmp_path / "photo.jpg")
  assert cv2.imwrite(photo, np.zeros((40, 30, 3), np.uint8))
  with pytest.raises(errors.DataError, match=r"30 x 40 .* 16 x 16.*; align it as the"):
    _run((images[0], photo), workdir, far=0.1, align=False)
  pathlib.Path(photo).write_bytes(b"no image")
  with pytest.raises(errors.DataError, match=r"photo\.jpg: .*; give an image"):
    _run((images[0], photo), workdir)


def test_the_face_in_a_photo_is_aligned_as_the_image_beside_it_is(
  workdir, tmp_path, capsys, caplog
):
  (tmp_path / "cells.onnx").write_bytes(face_model.model())
  pixels = np.full((500, 448, 3), 90, np.uint8)
  face_model.paint(pixels, 3, 3, scale=2)
  points = (face_model.landmarks_of(3, 3) + 0.5) * 2 - 0.5
  pixels[int(points[0, 1]) :, :200] += 60  # so that both halves differ
  warp, _ = cv2.estimateAffinePartial2D(points, alignment.TEMPLATE * SIZE / 112)
  photo, aligned = str(tmp_path / "photo.png"), str(tmp_path / "aligned.png")
  assert cv2.imwrite(photo, pixels)
  assert cv2.imwrite(aligned, cv2.warpAffine(pixels, warp, (SIZE, SIZE)))
  yunet = str(tmp_path / "cells.onnx")
  _run((photo, aligned), workdir, far=0.1, json=True, yunet=yunet)
  said = json.loads(capsys.readouterr().out)
  assert said["cosine"] == pytest.approx(1, abs=1e-4)
  assert said["alignment"].pop("detector").startswith("cells.onnx ")
  facts = {"template": "arcface", "face": "largest", "images": [photo]}
  assert said["alignment"] == facts
  assert "faces were found" not in caplog.text


def test_a_photo_of_two_is_told_and_one_of_nobody_is_an_error(
  workdir, images, tmp_path, caplog
):
  (tmp_path / "cells.onnx").write_bytes(face_model.model())
  photo = np.full((224, 224, 3), 90, np.uint8)
  path = str(tmp_path / "photo.png")
  assert cv2.imwrite(path, photo)
  yunet = str(tmp_path / "cells.onnx")
  with pytest.raises(errors.DataError, match=r"photo\.png: no face was found; give a"):
    _run((images[0], path), workdir, far=0.1, yunet=yunet)
  face_model.paint(photo, 3, 3)
  face_model.paint(photo, 2, 2, cell=face_model.SMALL)
  assert cv2.imwrite(path, photo)
  _run((images[0], path), workdir, far=0.1, yunet=yunet)
  assert f"{path}: 2 faces were found, and the one that --face=largest" in caplog.text


def test_leading_words_are_the_two_images():
  flags = ["--first=a", "--second=b", "--workdir=c"]
  assert compare.with_images_as_flags(["a", "b", "--workdir=c"]) == flags
  assert compare.with_images_as_flags(["--first=a", "b"]) == ["--first=a", "b"]
  assert compare.with_images_as_flags(["a", "b", "c"])[2] == "c"
