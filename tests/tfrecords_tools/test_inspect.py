"""tfrecords_tools.inspect: numbers, pictures and differences of small built sets."""

import dataclasses
import json
import pathlib
import shutil

import cv2
import numpy as np
import pytest
from matplotlib import axes, figure
from matplotlib.backends import backend_agg

from facedist import errors, storage
from facedist.data.shards import manifest
from tests import files
from tests.tfrecords_tools import shard_folders
from tfrecords_tools import build, inspect
from tfrecords_tools.validation import pictures, scan, stats


@pytest.fixture
def built(vggface2_dir, build_config):
  """Returns a function that builds the 4, 3 and 1 images of three identities."""

  def make(folder: str, **changes: object) -> str:
    settings = build_config(vggface2_dir, output_dir=folder, **changes)
    build.main(settings)
    return settings.output_dir

  return make


def report_of(data_dir: str, report: pathlib.Path, **flags: object) -> dict:
  """Runs the command in this process; returns its report and exit code."""
  settings = inspect.InspectConfig(
    data_dir=data_dir, report=str(report), num_processes=1, **flags
  )
  code = inspect.main(settings)
  return json.loads(report.read_text()) | {"exit_code": int(code)}


def test_the_report_counts_images_by_identity_and_split(built, tmp_path):
  shards = built(str(tmp_path / "shards"), val_fraction=0.3)
  found = report_of(shards, tmp_path / "summary.json")
  assert (found["format"], found["format_version"]) == ("facedist-summary", 1)
  assert found["identities"] == [
    {"identity": "n000001", "images": 3},
    {"identity": "n000003", "images": 4},
    {"identity": "n000007", "images": 1},
  ]
  # 30 % of 4 and of 3 images are one each, and of a single image none.
  records = {name: split["records"] for name, split in found["splits"].items()}
  assert records == {"train": 6, "val": 2}
  written = sum(split["bytes"] for split in found["splits"].values())
  assert written == sum(
    path.stat().st_size for path in pathlib.Path(shards).glob("*.tfrecord")
  )
  assert found["images_of_an_identity"] == {
    "least": 1,
    "median": 3.0,
    "mean": 8 / 3,
    "most": 4,
  }
  assert found["settings"]["source.seed"] == 0
  assert found["exit_code"] == 0


def test_the_text_is_the_same_for_a_disk_and_a_bucket(built, bucket, tmp_path, capsys):
  shards = built(str(tmp_path / "shards"))
  inspect.main(inspect.InspectConfig(data_dir=shards))
  on_disk = capsys.readouterr().out.splitlines()
  for path in pathlib.Path(shards).iterdir():
    if path.is_file():
      storage.upload(str(path), f"{bucket}/shards/{path.name}")
  flags = {"pictures": f"{bucket}/shown", "report": f"{bucket}/summary.json"}
  inspect.main(inspect.InspectConfig(data_dir=f"{bucket}/shards", **flags))
  assert capsys.readouterr().out.splitlines()[1:] == on_disk[1:]
  assert any(line.split()[:3] == ["4", "1", "█" * 40] for line in on_disk)
  names = ["contact_sheet.png", "histograms.png"]
  assert storage.list_names(f"{bucket}/shown") == names
  assert storage.exists(f"{bucket}/summary.json")


def test_a_corrupt_index_is_an_error_that_names_the_command_that_says_more(
  built, tmp_path
):
  shards = built(str(tmp_path / "shards"))
  path = pathlib.Path(shards) / "train-00001-of-00002.index.npy"
  files.flip_byte(path, -1)
  with pytest.raises(
    errors.DataError,
    match=r"is corrupt: CRC mismatch; run python -m tfrecords_tools.rebuild_index",
  ):
    inspect.main(inspect.InspectConfig(data_dir=shards))


def drawn(path: pathlib.Path) -> np.ndarray:
  """Returns a PNG file's pixels, BGR."""
  return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)


def test_the_sheet_shows_faces_in_their_own_colours(tmp_path):
  red = np.zeros((112, 112, 3), np.uint8)
  red[..., 0] = 255  # RGB
  section = pictures.Section("a", [pictures.PictureFace(red, ("n000001", "a.jpg"))])
  path = tmp_path / "sheet.png"
  pictures.draw_sheet(str(path), "title", [section])
  pixels = drawn(path).reshape(-1, 3)
  assert (pixels == (0, 0, 255)).all(axis=1).sum() == 128 * 128


def test_a_corrupt_record_has_a_grey_tile_and_what_is_wrong(built, tmp_path):
  shards = built(str(tmp_path / "shards"))
  made = manifest.load(shards)
  found, _ = scan.find_records(shards, made, numbers=[5], labels=[], each=1)
  place = found[5]
  with open(place.path, "r+b") as stream:
    stream.seek(place.offset + 60)
    byte = stream.read(1)
    stream.seek(place.offset + 60)
    stream.write(bytes([byte[0] ^ 1]))
  face = pictures.read_face(place, image_size=112, caption="n000001")
  assert face.image is None
  assert face.captions == ("n000001", "CRC mismatch.")
  inspect.main(inspect.InspectConfig(data_dir=shards, pictures=str(tmp_path / "shown")))
  grey = (drawn(tmp_path / "shown" / "contact_sheet.png") == 230).all(axis=2).sum()
  assert grey > 128 * 128 / 2


def test_records_are_found_by_number_and_by_identity(built, tmp_path):
  shards = built(str(tmp_path / "shards"))
  made = manifest.load(shards)
  found, of_label = scan.find_records(
    shards, made, numbers=range(8), labels=[0, 2], each=2
  )
  names = [
    pictures.read_face(found[one], image_size=112, caption=None).captions
    for one in range(8)
  ]
  assert len(set(zip(names, [found[one].label for one in range(8)], strict=True))) == 8
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


def bars_of(panel: axes.Axes) -> dict[float, tuple[float, float]]:
  """Returns width and height of the bars by where they begin."""
  bars = panel.containers[0]
  return {bar.get_x(): (bar.get_width(), bar.get_height()) for bar in bars}


def test_a_long_tail_has_bins_of_doubling_width_that_fill_the_panel():
  panel = axes_of([0, 1, 2, 3, 3, 4, 7, 100, 1000])
  expected = {0: (1, 1), 1: (1, 1), 2: (2, 3), 4: (4, 2), 64: (64, 1), 512: (512, 1)}
  bars = bars_of(panel)
  assert {place: bars[place] for place in expected} == expected
  assert sum(height for _, height in bars.values()) == 9
  assert panel.get_xlim() == (0, 1024)
  assert panel.get_xticks().tolist() == [0, *(1 << power for power in range(11))]
  places = panel.transData.transform([(place, 0) for place in panel.get_xticks()])
  np.testing.assert_allclose(np.diff(places[:, 0]), panel.bbox.width / 11)


def test_an_even_spread_makes_even_bars():
  bars = bars_of(axes_of([*range(1, 91)]))  # into 60 bins it would not go
  assert set(bars.values()) == {(2, 2)}


@pytest.mark.parametrize("values", [[6] * 500, [7], [0, 0], [1, 2], [900, 990]])
def test_ticks_are_whole_numbers_that_can_be(values):
  panel = axes_of(values)
  low, high = panel.get_xlim()
  assert low >= -0.5  # where the bar of 0 begins
  assert low <= min(values) <= max(values) < high
  for ticks in (panel.get_xticks(), panel.get_yticks()):
    assert len(ticks) > 0
    assert (ticks == np.round(ticks)).all()


def test_captions_fit_and_hold_only_letters_that_the_font_has():
  assert pictures.shorten("n000001", 21) == "n000001"
  assert pictures.shorten("Abcdefghijklmnopqrstuvwxyz", 9) == "Abcd…wxyz"
  assert pictures.drawable("André $x$ 李") == "André $x$ ?"


def test_a_set_is_the_same_as_itself_and_as_a_copy(built, tmp_path):
  first = built(str(tmp_path / "a"))
  second = built(str(tmp_path / "b"))
  found = report_of(first, tmp_path / "diff.json", diff=second)
  assert (found["same"], found["exit_code"]) == (True, 0)
  assert found["counts"]["same"] == 8
  assert found["images"] == []


def test_other_names_of_people_and_other_images_left_out_are_a_difference(
  built, tmp_path, capsys
):
  first = built(str(tmp_path / "a"))
  second = tmp_path / "b"
  shutil.copytree(first, second)
  made = manifest.load(first)
  names = made.identity_names | {"n000001": "Another"}
  skipped = ({"path": "n000001/9.jpg", "reason": "cut off"},)
  manifest.save(
    dataclasses.replace(made, identity_names=names, skipped=skipped), str(second)
  )
  found = report_of(str(second), tmp_path / "diff.json", diff=first)
  assert (found["same"], found["exit_code"]) == (False, 8)
  assert found["counts"]["same"] == 8
  before = made.identity_names.get("n000001")
  assert found["changes"] == [
    {"name": "identity_names.n000001", "old": before, "new": "Another"},
    {"name": "skipped.n000001/9.jpg", "old": None, "new": "cut off"},
  ]
  out = capsys.readouterr().out
  assert f"identity_names.n000001: {before} -> Another" in out


@pytest.mark.parametrize(
  "given",
  [
    ["NEW", "--diff=OLD", "--seed=1"],
    ["NEW", "--diff", "OLD", "--seed=1"],
    ["--diff", "OLD", "NEW", "--seed=1"],
    ["--diff=OLD", "NEW", "--seed=1"],
    ["--seed=1", "--diff", "OLD", "NEW"],
    ["--seed=1", "--diff", "OLD", "--data_dir=NEW"],
  ],
)
def test_two_folders_are_given_with_or_without_flags(given):
  named = inspect.with_folders_as_flags(given)
  parsed = " ".join(named).replace("--diff OLD", "--diff=OLD").split()
  assert sorted(parsed) == ["--data_dir=NEW", "--diff=OLD", "--seed=1"]


def test_another_seed_moves_images_between_splits_and_nothing_else(built, tmp_path):
  old = built(str(tmp_path / "a"), val_fraction=0.3)
  new = built(str(tmp_path / "b"), val_fraction=0.3, seed=1)
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
  old = built(str(tmp_path / "a"), image_list="none")
  (vggface2_dir / "n000007" / "0001_01.jpg").unlink()
  changed = vggface2_dir / "n000001" / "0002_01.jpg"
  changed.write_bytes((vggface2_dir / "n000003" / "0001_01.jpg").read_bytes())
  (vggface2_dir / "n000003" / "0004_01.jpg").rename(
    vggface2_dir / "n000003" / "0009_01.jpg"
  )
  new = built(str(tmp_path / "b"), image_list="none", missing_row="crop", num_shards=1)
  found = report_of(new, tmp_path / "diff.json", diff=old)
  gone = {"name": "identities.n000007", "old": 2, "new": None}
  assert gone in found["changes"]
  expected = {"same": 5, "added": 1, "removed": 2, "content": 1}
  assert {kind: found["counts"][kind] for kind in expected} == expected
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


def test_an_identity_added_before_others_moves_their_labels(
  built, vggface2_dir, tmp_path
):
  new = built(str(tmp_path / "a"))
  excluded = tmp_path / "excluded.txt"
  excluded.write_text("n000001\n")
  old = built(str(tmp_path / "b"), exclude_identities=str(excluded))
  found = report_of(new, tmp_path / "diff.json", diff=old)
  moved = [one for one in found["changes"] if one["name"].startswith("identities.")]
  assert sorted(moved, key=lambda one: one["name"]) == [
    {"name": "identities.n000001", "old": None, "new": 0},
    {"name": "identities.n000003", "old": 0, "new": 1},
    {"name": "identities.n000007", "old": 1, "new": 2},
  ]
  assert found["counts"]["added"] == 3
  assert found["counts"]["same"] == 5


def test_a_name_that_comes_twice_is_compared_as_often(tmp_path):
  face = ("a", 1)
  shard_folders.write(str(tmp_path / "old"), {"train": [face, face]})
  shard_folders.write(str(tmp_path / "new"), {"train": [face, face, face]})
  report = tmp_path / "diff.json"
  found = report_of(str(tmp_path / "new"), report, diff=str(tmp_path / "old"))
  assert found["counts"]["same"] == 2
  assert found["counts"]["added"] == 1


def test_verification_sets_are_compared_too(lfw_dir, build_config, tmp_path):
  folders = [str(tmp_path / name) for name in "ab"]
  for folder, quality in zip(folders, (95, 80), strict=True):
    changes = {"dataset": "lfw", "num_shards": None, "image_size": 64}
    build.main(build_config(lfw_dir, output_dir=folder, quality=quality, **changes))
  found = report_of(folders[0], tmp_path / "diff.json", diff=folders[1])
  assert found["counts"]["content"] == 6
  assert {"name": "quality", "old": 80, "new": 95} in found["changes"]
