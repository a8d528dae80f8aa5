import os

import cv2
import numpy as np
import pytest

from facedist import errors, storage
from facedist.data.shards import manifest
from tests import files
from tests.tfrecords_tools.folders import files_of, problems_of, records_of, times_of
from tfrecords_tools import build

LAST = "train-00001-of-00002.tfrecord"


def test_the_shards_hold_each_image_once_with_its_label(vggface2_dir, build_set):
  found = records_of(build_set(vggface2_dir))
  assert sorted((record.filename, record.label) for record in found) == [
    *((f"n000001/000{number}_01.jpg", 0) for number in (1, 2, 3)),
    *((f"n000003/000{number}_01.jpg", 1) for number in (1, 2, 3, 4)),
    ("n000007/0001_01.jpg", 2),
  ]
  for record in found:
    assert record.identity == record.filename.split("/")[0]
    image = cv2.imdecode(np.frombuffer(record.jpeg, np.uint8), cv2.IMREAD_UNCHANGED)
    assert image.shape == (112, 112, 3)


def test_the_manifest_tells_what_the_shards_hold(vggface2_dir, build_set):
  excluded = vggface2_dir.parent / "exclude.txt"
  excluded.write_text("n000007\n")
  changes = {"image_size": 96, "quality": 80, "seed": 5}
  folder = build_set(vggface2_dir, exclude_identities=str(excluded), **changes)
  made = manifest.load(folder)
  assert (made.kind, made.dataset) == ("classification", "vggface2")
  assert (made.image_size, made.quality) == (96, 80)
  assert made.identities == ("n000001", "n000003")
  assert made.identity_names == {
    "n000001": "Ada_Lovelace",
    "n000003": "Anne,_Princess_Royal",
  }
  assert made.alignment == {"template": "arcface", "images": {"landmarks": 7}}
  assert made.source["seed"] == 5
  assert made.source["excluded_identities"] == ["n000007"]
  assert [shard.records for shard in made.splits["train"].shards] == [4, 3]
  assert made.splits["train"].records == 7
  assert problems_of(folder) == []


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
  vggface2_dir, build_set
):
  one, same, other = (
    files_of(build_set(vggface2_dir, output_dir=name, seed=seed))
    for name, seed in (("one", 0), ("same", 0), ("other", 1))
  )
  assert one == same
  assert one[LAST] != other[LAST]


def test_no_machines_path_is_in_the_folder(vggface2_dir, build_set, tmp_path):
  (vggface2_dir / "n000001" / "0001_01.jpg").write_bytes(b"broken")
  content = b"".join(files_of(build_set(vggface2_dir)).values())
  assert str(tmp_path).encode() not in content


@pytest.fixture
def two_broken(vggface2_dir):
  """The folder with one image cut off and another that is missing."""
  path = vggface2_dir / "n000003" / "0002_01.jpg"
  path.write_bytes(path.read_bytes()[:-50])
  (vggface2_dir / "n000001" / "0003_01.jpg").unlink()
  return vggface2_dir


def test_a_broken_image_is_named_counted_and_skipped(two_broken, build_config, caplog):
  config = build_config(two_broken, max_bad=2)
  assert build.main(config) == errors.ExitCode.PARTIAL
  assert build.main(config) == errors.ExitCode.PARTIAL  # finished; nothing to do
  folder = config.output_dir
  made = manifest.load(folder)
  assert made.skipped == (
    {"path": "n000001/0003_01.jpg", "reason": "No such file or directory"},
    {"path": "n000003/0002_01.jpg", "reason": "it is cut off or not an image"},
  )
  assert made.splits["train"].records == 6 == len(records_of(folder))
  assert made.alignment["images"] == {"landmarks": 6}
  assert problems_of(folder) == []
  for entry in made.skipped:
    assert f"skipped {entry['path']}: {entry['reason']}" in caplog.text


def test_too_many_broken_images_end_the_build(two_broken, build_set):
  with pytest.raises(errors.DataError, match=r"number 2, and 1 may be.*--max_bad"):
    build_set(two_broken, max_bad=1)
  assert len(records_of(build_set(two_broken, max_bad=2))) == 6


def test_a_set_of_broken_images_only_is_an_error(vggface2_dir, build_set):
  for path in vggface2_dir.glob("*/*.jpg"):
    path.write_bytes(b"")
  with pytest.raises(errors.DataError, match=r"no image below .* could be read"):
    build_set(vggface2_dir)


def test_a_build_continues_with_the_unfinished_shards(two_broken, build_set, caplog):
  caplog.set_level("INFO", logger="absl")
  whole = files_of(build_set(two_broken, output_dir="whole", num_shards=4))
  folder = build_set(two_broken, num_shards=4, only_shards="0,2")
  assert "2 shards remain" in caplog.text
  before = times_of(folder)
  wanted = {f"train-0000{shard}-of-00004.tfrecord" for shard in (0, 2)}
  assert {name for name in before if name.endswith(".tfrecord")} == wanted
  assert "manifest.json" not in before
  build_set(two_broken, num_shards=4)
  assert files_of(folder) == whole
  assert before.items() <= times_of(folder).items()


def test_a_finished_build_says_so_and_changes_nothing(vggface2_dir, build_set, caplog):
  caplog.set_level("INFO", logger="absl")
  folder = build_set(vggface2_dir, val_fraction=0.3)
  assert "8 images of 3 identities; shards: 2 train, 1 val; the" in caplog.text
  times = times_of(folder)
  build_set(vggface2_dir, val_fraction=0.3)
  assert f"{folder} is finished; nothing to do" in caplog.text
  assert times_of(folder) == times


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_a_deleted_shard_is_written_again_as_it_was(
  vggface2_dir, build_set, bucket, where
):
  local = files_of(build_set(vggface2_dir, output_dir="local"))
  output_dir = f"{bucket}/shards" if where == "bucket" else "shards"
  folder = build_set(vggface2_dir, output_dir=output_dir)
  storage.remove(f"{folder}/{LAST}")
  (problem,) = problems_of(folder)
  assert f"{LAST} is missing" in problem
  build_set(vggface2_dir, output_dir=output_dir)
  assert files_of(folder) == local


def test_a_corrupt_shard_is_rebuilt_as_the_error_says(vggface2_dir, build_set):
  folder = build_set(vggface2_dir)
  before = files_of(folder)
  files.flip_byte(f"{folder}/{LAST}", 200)
  assert problems_of(folder)[0].endswith("rebuild this shard with --only_shards=1")
  build_set(vggface2_dir, only_shards="1")
  assert files_of(folder) == before


@pytest.mark.parametrize("text", ["x", "1,", "5"])
def test_shards_that_are_none_are_refused(vggface2_dir, build_set, text):
  with pytest.raises(errors.UsageError, match="--only_shards"):
    build_set(vggface2_dir, only_shards=text)


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"image_size": 160}, "image_size: 112 -> 160"),
    ({"quality": 90}, "quality: 95 -> 90"),
    ({"num_shards": 3}, r"shards: .*2.* -> .*3"),
    ({"val_fraction": 0.3}, "val_fraction: 0.0 -> 0.3"),
  ],
)
def test_other_settings_in_the_same_folder_are_refused(
  vggface2_dir, build_set, changes, reason
):
  folder = build_set(vggface2_dir)
  before = files_of(folder)
  with pytest.raises(errors.ConfigError, match=reason):
    build_set(vggface2_dir, **changes)
  assert files_of(folder) == before


def test_a_folder_of_strange_shards_is_refused(vggface2_dir, build_set, tmp_path):
  (tmp_path / "shards").mkdir()
  (tmp_path / "shards" / LAST).touch()
  with pytest.raises(errors.ConfigError, match="not the settings it was built with"):
    build_set(vggface2_dir)


def test_people_of_lfw_are_reported(vggface2_dir, build_set, caplog):
  caplog.set_level("INFO", logger="absl")
  names = vggface2_dir.parent / "pairs.txt"
  names.write_text("1\nAda_Lovelace\t1\t2\nAda_Lovelace\t1\tCher\t1\n")
  folder = build_set(vggface2_dir, lfw_names=str(names))
  assert manifest.load(folder).source["lfw_overlap"] == ["n000001"]
  assert "n000001 (Ada_Lovelace) is also in LFW" in caplog.text
  assert "1 of 3 identities are also in LFW" in caplog.text


def test_the_tables_beside_the_folder_can_be_ignored(vggface2_dir, build_set):
  made = manifest.load(build_set(vggface2_dir, landmarks="none", identity_meta="none"))
  assert made.alignment == {"template": "centre_crop", "images": {"centre_crop": 8}}
  assert made.identity_names == {}


def test_a_verification_set_has_exactly_the_pairs_listed(lfw_dir, build_set):
  folder = build_set(lfw_dir, dataset="lfw")
  made = manifest.load(folder)
  assert made.kind == "verification"
  assert (made.pairs.pairs, made.pairs.folds) == (4, 2)
  images = records_of(folder, "images")
  pairs = np.load(os.path.join(folder, "pairs.npy"))
  assert pairs.dtype == np.int32
  named = [
    (images[first].filename[-11:-4], images[second].filename[-11:-4], same, fold)
    for first, second, same, fold in pairs.tolist()
  ]
  assert named == [
    ("ek_0001", "ek_0002", 1, 0),
    ("er_0001", "do_0001", 0, 0),
    ("re_0001", "re_0002", 1, 1),
    ("re_0002", "ek_0001", 0, 1),
  ]
  assert problems_of(folder) == []


def test_images_that_are_aligned_keep_their_bytes(lfw_dir, build_set):
  folder = build_set(lfw_dir, dataset="lfw")
  for record in records_of(folder, "images"):
    assert record.jpeg == (lfw_dir / record.filename).read_bytes()
  made = manifest.load(folder)
  assert made.alignment["images"] == {"source_bytes_kept": 6}
  assert made.aligned_by == manifest.AS_GIVEN


def test_images_of_another_size_are_cut_from_the_centre_with_a_warning(
  lfw_dir, build_set, caplog
):
  folder = build_set(lfw_dir, dataset="lfw", image_size=96)
  assert "6 of 6 images were cut from the centre" in caplog.text
  assert manifest.load(folder).alignment["images"] == {"centre_crop": 6}


def test_a_verification_set_needs_pairs_and_leaves_none_out(lfw_dir, build_set):
  with pytest.raises(errors.UsageError, match="--missing_row=skip would break"):
    build_set(lfw_dir, dataset="lfw", missing_row="skip")
  (lfw_dir.parent / "pairs.txt").unlink()
  with pytest.raises(errors.UsageError, match="--pairs is required"):
    build_set(lfw_dir, dataset="lfw")


@pytest.mark.real_data
def test_real_faces_are_aligned_and_their_overlap_with_lfw_is_found(
  real_data, build_set, tmp_path
):
  sample = real_data / "vggface2_sample"
  lines = (sample / "train_list.txt").read_text().splitlines()
  wanted = [line for line in lines if line.startswith(("n000002/", "n000021/"))][::4]
  (tmp_path / "some.txt").write_text("\n".join(wanted))
  folder = build_set(
    sample / "train",
    image_list=str(tmp_path / "some.txt"),
    lfw_names=str(real_data / "lfw" / "pairs.txt"),
    val_fraction=0.2,
  )
  made = manifest.load(folder)
  assert made.source["lfw_overlap"] == ["n000021"]
  assert made.identity_names == {"n000002": "A_Fine_Frenzy", "n000021": "Aaron_Tippin"}
  assert sum(split.records for split in made.splits.values()) == len(wanted) == 30
  assert problems_of(folder) == []


@pytest.mark.parametrize(
  "change",
  [
    lambda values: [*values[0::2], *values[1::2]],  # x1..x5,y1..y5
    lambda values: [value / 80 for value in values],  # fractions of the image
    lambda values: [0.0, 0.0, *values[2:]],  # a point at 0,0
  ],
)
def test_landmarks_that_are_no_faces_end_the_build(vggface2_dir, build_set, change):
  table = vggface2_dir.parent / "loose_landmark_train.csv"
  header, *rows = table.read_text().splitlines()
  changed = [header]
  for row in rows:
    name, *values = row.split(",")
    changed.append(",".join([name, *map(str, change([*map(float, values)]))]))
  table.write_text("\n".join(changed))
  with pytest.raises(errors.DataError, match=r"4 of 4 images cannot be.*x1,y1"):
    build_set(vggface2_dir)
