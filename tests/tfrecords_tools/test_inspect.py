"""tfrecords_tools.inspect: numbers, pictures and differences of small built sets."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib import axes, figure
from matplotlib.backends import backend_agg

from facedist import errors, storage
from facedist.data.shards import manifest
from tests import files
from tests.tfrecords_tools import shard_folders
from tests.tfrecords_tools.folders import upload
from tfrecords_tools import inspect
from tfrecords_tools.validation import pictures, scan, stats


@pytest.fixture
def built(vggface2_dir, build_set):
  """Builds the 4, 3 and 1 images of three identities; returns the folder."""
  return lambda folder="shards", **changes: build_set(
    vggface2_dir, output_dir=folder, **changes
  )


def report_of(data_dir: str, report: pathlib.Path, **flags: Any) -> dict:
  """Runs the command in this process; returns its report and exit code."""
  code = inspect.main(
    inspect.InspectConfig(data_dir, report=str(report), num_processes=1, **flags)
  )
  return json.loads(report.read_text()) | {"exit_code": int(code)}


def test_the_report_counts_images_by_identity_and_split(built, tmp_path):
  shards = built(val_fraction=0.3)
  found = report_of(shards, tmp_path / "summary.json")
  assert (found["format"], found["format_version"]) == ("facedist-summary", 1)
  counts = {one["identity"]: one["images"] for one in found["identities"]}
  assert counts == {"n000001": 3, "n000003": 4, "n000007": 1}
  # 30 % of 4 and of 3 images are one each, and of a single image none.
  records = {name: split["records"] for name, split in found["splits"].items()}
  assert records == {"train": 6, "val": 2}
  sizes = [path.stat().st_size for path in pathlib.Path(shards).glob("*.tfrecord")]
  assert sum(split["bytes"] for split in found["splits"].values()) == sum(sizes)
  statistics = {"least": 1, "median": 3.0, "mean": 8 / 3, "most": 4}
  assert found["images_of_an_identity"] == statistics
  assert found["settings"]["source.seed"] == 0
  assert found["exit_code"] == 0


def test_the_text_is_the_same_for_a_disk_and_a_bucket(built, bucket, capsys):
  shards = built()
  inspect.main(inspect.InspectConfig(shards))
  on_disk = capsys.readouterr().out.splitlines()
  there = upload(shards, f"{bucket}/shards")
  flags = {"pictures": f"{bucket}/shown", "report": f"{bucket}/summary.json"}
  inspect.main(inspect.InspectConfig(there, **flags))
  assert capsys.readouterr().out.splitlines()[1:] == on_disk[1:]
  assert any(line.split()[:3] == ["4", "1", "█" * 40] for line in on_disk)
  names = ["contact_sheet.png", "histograms.png"]
  assert storage.list_names(f"{bucket}/shown") == names
  assert storage.exists(f"{bucket}/summary.json")


def test_a_corrupt_index_is_an_error_that_names_the_command_that_says_more(built):
  shards = built()
  files.flip_byte(f"{shards}/train-00001-of-00002.index.npy", -1)
  text = r"is corrupt: CRC mismatch; run python -m tfrecords_tools.rebuild_index"
  with pytest.raises(errors.DataError, match=text):
    inspect.main(inspect.InspectConfig(shards))


def drawn(path: pathlib.Path) -> np.ndarray:
  """Returns a PNG file's pixels, BGR."""
  return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)


def test_the_sheet_shows_faces_in_their_own_colours(tmp_path):
  red = np.full((112, 112, 3), (255, 0, 0), np.uint8)  # RGB
  section = pictures.Section("a", [pictures.PictureFace(red, ("n000001", "a.jpg"))])
  pictures.draw_sheet(str(tmp_path / "sheet.png"), "title", [section])
  pixels = drawn(tmp_path / "sheet.png").reshape(-1, 3)
  assert (pixels == (0, 0, 255)).all(axis=1).sum() == 128 * 128


def test_a_corrupt_record_has_a_grey_tile_and_what_is_wrong(built, tmp_path):
  shards = built()
  made = manifest.load(shards)
  found, _ = scan.find_records(shards, made, numbers=[5], labels=[], each=1)
  files.flip_byte(found[5].path, found[5].offset + 60)
  face = pictures.read_face(found[5], image_size=112, caption="n000001")
  assert face.image is None
  assert face.captions == ("n000001", "CRC mismatch.")
  inspect.main(inspect.InspectConfig(shards, pictures=str(tmp_path / "shown")))
  grey = (drawn(tmp_path / "shown" / "contact_sheet.png") == 230).all(axis=2).sum()
  assert grey > 128 * 128 / 2


def test_records_are_found_by_number_and_by_identity(built):
  shards = built()
  found, of_label = scan.find_records(
    shards, manifest.load(shards), numbers=range(8), labels=[0, 2], each=2
  )
  assert sorted(found) == list(range(8))
  assert len({(place.path, place.offset) for place in found.values()}) == 8
  assert [place.label for place in of_label[0]] == [0, 0]
  assert [place.label for place in of_label[2]] == [2]


@pytest.mark.parametrize(
  ("values", "most", "expected"),
  [
    ([3], 12, [3, 4]),
    ([1, 2, 4], 12, [1, 2, 3, 4, 5]),
    ([0, 99], 4, [0, 25, 50, 75, 100]),
    ([1, 90], 60, [*range(1, 92, 2)]),
    ([1] * 9 + [9999], 4, [1, 16, 256, 4096, 65536]),
    ([0, 3, 3, 500], 12, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]),
  ],
)
def test_bins_are_even_steps_or_even_factors(values, most, expected):
  assert stats.edges(np.array(values), most).tolist() == expected


def axes_of(values: list[int]) -> axes.Axes:
  """Returns the panel of a histogram, drawn."""
  drawing = figure.Figure()
  panel = drawing.subplots()
  weights = np.ones(len(values))
  pictures.draw_bars(panel, np.array(values), weights, color="black")
  backend_agg.FigureCanvasAgg(drawing).draw()
  return panel


def test_a_long_tail_has_bins_of_doubling_width_that_fill_the_panel():
  panel = axes_of([0, 1, 2, 3, 3, 4, 7, 100, 1000])
  expected = {0: (1, 1), 1: (1, 1), 2: (2, 3), 4: (4, 2), 64: (64, 1), 512: (512, 1)}
  bars = {
    bar.get_x(): (bar.get_width(), bar.get_height()) for bar in panel.containers[0]
  }
  assert {place: bars[place] for place in expected} == expected
  assert sum(height for _, height in bars.values()) == 9
  assert panel.get_xlim() == (0, 1024)
  assert panel.get_xticks().tolist() == [0, *(1 << power for power in range(11))]
  places = panel.transData.transform([(place, 0) for place in panel.get_xticks()])
  np.testing.assert_allclose(np.diff(places[:, 0]), panel.bbox.width / 11)


@pytest.mark.parametrize("values", [[6] * 500, [7], [0, 0], [1, 2], [900, 990]])
def test_ticks_are_whole_numbers_that_can_be(values):
  panel = axes_of(values)
  low, high = panel.get_xlim()
  assert low >= -0.5  # where the bar of 0 begins
  bars = [(bar.get_x(), bar.get_width()) for bar in panel.containers[0]]
  assert all(left % 1 == 0.5 for left, width in bars if width == 1)  # on its number
  assert low <= min(values) <= max(values) < high
  for ticks in (panel.get_xticks(), panel.get_yticks()):
    assert len(ticks) > 0
    assert (ticks == np.round(ticks)).all()


def test_captions_fit_and_hold_only_letters_that_the_font_has():
  assert pictures.shorten("n000001", 21) == "n000001"
  assert pictures.shorten("Abcdefghijklmnopqrstuvwxyz", 9) == "Abcd…wxyz"
  assert pictures.drawable("André $x$ 李") == "André $x$ ?"


def test_a_set_is_the_same_as_itself_and_as_a_copy(built, tmp_path):
  found = report_of(built("a"), tmp_path / "diff.json", diff=built("b"))
  assert (found["same"], found["exit_code"]) == (True, 0)
  assert found["counts"]["same"] == 8
  assert found["images"] == []


def test_other_names_of_people_and_other_images_left_out_are_a_difference(
  built, tmp_path, capsys
):
  first, second = built("a"), str(tmp_path / "b")
  shutil.copytree(first, second)
  made = manifest.load(first)
  names = made.identity_names | {"n000001": "Another"}
  skipped = ({"path": "n000001/9.jpg", "reason": "cut off"},)
  changed = dataclasses.replace(made, identity_names=names, skipped=skipped)
  manifest.save(changed, second)
  found = report_of(second, tmp_path / "diff.json", diff=first)
  assert (found["same"], found["exit_code"]) == (False, 8)
  assert found["counts"]["same"] == 8
  assert found["changes"] == [
    {"name": "identity_names.n000001", "old": "Ada_Lovelace", "new": "Another"},
    {"name": "skipped.n000001/9.jpg", "old": None, "new": "cut off"},
  ]
  out = capsys.readouterr().out
  assert "identity_names.n000001: Ada_Lovelace -> Another" in out


@pytest.mark.parametrize(
  "given",
  [
    ["NEW", "--diff", "OLD", "--seed=1"],
    ["--diff", "OLD", "NEW", "--seed=1"],
    ["--diff=OLD", "NEW", "--seed=1"],
    ["--seed=1", "--diff", "OLD", "--data_dir=NEW"],
  ],
)
def test_two_folders_are_given_with_or_without_flags(given):
  named = inspect.with_folders_as_flags(given)
  parsed = " ".join(named).replace("--diff OLD", "--diff=OLD").split()
  assert sorted(parsed) == ["--data_dir=NEW", "--diff=OLD", "--seed=1"]


def test_another_seed_moves_images_between_splits_and_nothing_else(built, tmp_path):
  old, new = built("a", val_fraction=0.3), built("b", val_fraction=0.3, seed=1)
  found = report_of(new, tmp_path / "diff.json", diff=old)
  assert (found["same"], found["exit_code"]) == (False, 8)
  seed, fingerprint = found["changes"]
  assert seed == {"name": "source.seed", "old": 0, "new": 1}
  assert fingerprint["name"] == "fingerprint"
  counts = found["counts"]
  assert counts["same"] + counts["split"] == 8
  assert counts["split"] == len(found["images"]) == 4
  for one in found["images"]:
    assert one["old"] | {"split": ""} == one["new"] | {"split": ""}
    assert {one["old"]["split"], one["new"]["split"]} == {"train", "val"}


def test_added_removed_and_changed_images_are_listed_by_identity(
  built, vggface2_dir, tmp_path, capsys
):
  old = built("a", image_list="none")
  (vggface2_dir / "n000007" / "0001_01.jpg").unlink()
  third = vggface2_dir / "n000003"
  shutil.copy(third / "0001_01.jpg", vggface2_dir / "n000001" / "0002_01.jpg")
  (third / "0004_01.jpg").rename(third / "0009_01.jpg")
  new = built("b", image_list="none", missing_row="crop", num_shards=1)
  found = report_of(new, tmp_path / "diff.json", diff=old)
  gone = {"name": "identities.n000007", "old": 2, "new": None}
  assert gone in found["changes"]
  expected = {"same": 5, "added": 1, "removed": 2, "content": 1}
  assert found["counts"] | expected == found["counts"]
  names = {
    (one["filename"], one["old"] is None, one["new"] is None) for one in found["images"]
  }
  assert names == {
    ("n000001/0002_01.jpg", False, False),
    ("n000003/0004_01.jpg", False, True),
    ("n000003/0009_01.jpg", True, False),
    ("n000007/0001_01.jpg", False, True),
  }
  out = capsys.readouterr().out
  assert "identities.n000007: 2 -> None" in out
  assert "n000001/0002_01.jpg: content" in out


def test_an_identity_added_before_others_moves_their_labels(built, tmp_path):
  (tmp_path / "excluded.txt").write_text("n000001\n")
  old = built("b", exclude_identities=str(tmp_path / "excluded.txt"))
  found = report_of(built("a"), tmp_path / "diff.json", diff=old)
  moved = {
    one["name"]: (one["old"], one["new"])
    for one in found["changes"]
    if one["name"].startswith("identities.")
  }
  assert moved == {
    "identities.n000001": (None, 0),
    "identities.n000003": (0, 1),
    "identities.n000007": (1, 2),
  }
  assert (found["counts"]["added"], found["counts"]["same"]) == (3, 5)


def test_a_name_that_comes_twice_is_compared_as_often(tmp_path):
  old = shard_folders.write(tmp_path / "old", {"train": [("a", 1)] * 2})
  new = shard_folders.write(tmp_path / "new", {"train": [("a", 1)] * 3})
  counts = report_of(new, tmp_path / "diff.json", diff=old)["counts"]
  assert (counts["same"], counts["added"]) == (2, 1)


def test_verification_sets_are_compared_too(lfw_dir, build_set, tmp_path):
  flags = {"dataset": "lfw", "image_size": 64}
  old, new = (
    build_set(lfw_dir, output_dir=str(quality), quality=quality, **flags)
    for quality in (80, 95)
  )
  found = report_of(new, tmp_path / "diff.json", diff=old)
  assert found["counts"]["content"] == 6
  assert {"name": "quality", "old": 80, "new": 95} in found["changes"]
