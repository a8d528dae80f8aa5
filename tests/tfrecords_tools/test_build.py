import json
import logging
import os
import pathlib
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from facedist import errors
from facedist.data.shards import manifest, shard_index, tfrecord
from tests import files
from tfrecords_tools import build, verify
from tfrecords_tools.builder import options, state


def folder_bytes(folder):
  """Every file's bytes by name, markers included."""
  root = pathlib.Path(folder)
  return {
    str(path.relative_to(root)): path.read_bytes()
    for path in root.rglob("*")
    if path.is_file()
  }


def read_all(folder, split):
  """The records of a split in order, by the manifest and the index alone."""
  found = []
  for shard in manifest.load(str(folder)).splits[split].shards:
    content = pathlib.Path(folder, shard.name).read_bytes()
    rows = shard_index.load(str(pathlib.Path(folder, shard.index_name)))
    for row in rows:
      start, length = int(row["offset"]), int(row["length"])
      record = tfrecord.parse(tfrecord.unframe(content[start : start + length]))
      image = start + int(row["image_offset"])
      assert content[image : image + int(row["image_length"])] == record.jpeg
      assert row["label"] == record.label
      found.append(record)
  return found


def build_into(config):
  build.main(config)
  return config.output_dir


def test_the_shards_hold_each_image_once_with_its_label(vggface2_dir, build_config):
  folder = build_into(build_config(vggface2_dir))
  found = read_all(folder, "train")
  assert sorted((record.filename, record.label) for record in found) == [
    *((f"n000001/000{number}_01.jpg", 0) for number in (1, 2, 3)),
    *((f"n000003/000{number}_01.jpg", 1) for number in (1, 2, 3, 4)),
    ("n000007/0001_01.jpg", 2),
  ]
  for record in found:
    assert record.identity == record.filename.split("/")[0]
    image = cv2.imdecode(np.frombuffer(record.jpeg, np.uint8), cv2.IMREAD_UNCHANGED)
    assert image.shape == (112, 112, 3)


def test_the_manifest_tells_what_the_shards_hold(vggface2_dir, build_config):
  excluded = vggface2_dir.parent / "exclude.txt"
  excluded.write_text("n000007\n")
  folder = build_into(
    build_config(
      vggface2_dir, exclude_identities=str(excluded), image_size=96, quality=80, seed=5
    )
  )
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
  assert list(verify.verify(folder, verify.Totals())) == []


def test_images_are_held_out_as_val(vggface2_dir, build_config):
  folder = build_into(build_config(vggface2_dir, val_fraction=0.3))
  train, val = read_all(folder, "train"), read_all(folder, "val")
  assert sorted(record.label for record in val) == [0, 1]
  assert len(train) == 6
  names = {record.filename for record in train}
  assert names.isdisjoint(record.filename for record in val)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
  vggface2_dir, build_config, tmp_path
):
  one = build_into(build_config(vggface2_dir, output_dir=str(tmp_path / "one")))
  two = build_into(build_config(vggface2_dir, output_dir=str(tmp_path / "two")))
  other = build_into(
    build_config(vggface2_dir, output_dir=str(tmp_path / "other"), seed=1)
  )
  assert folder_bytes(one) == folder_bytes(two)
  first = "train-00000-of-00002.tfrecord"
  assert folder_bytes(one)[first] != folder_bytes(other)[first]


@pytest.mark.slow
def test_the_number_of_processes_does_not_change_a_byte(
  vggface2_dir, build_config, tmp_path
):
  one = build_into(build_config(vggface2_dir, output_dir=str(tmp_path / "one")))
  two = build_into(
    build_config(vggface2_dir, output_dir=str(tmp_path / "two"), num_processes=2)
  )
  assert folder_bytes(one) == folder_bytes(two)


def test_no_machines_path_is_in_the_folder(vggface2_dir, build_config, tmp_path):
  (vggface2_dir / "n000001" / "0001_01.jpg").write_bytes(b"broken")
  folder = build_into(build_config(vggface2_dir))
  content = b"".join(folder_bytes(folder).values())
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
  assert made.splits["train"].records == 6 == len(read_all(folder, "train"))
  assert made.alignment["images"] == {"landmarks": 6}
  assert list(verify.verify(folder, verify.Totals())) == []
  for entry in made.skipped:
    assert f"skipped {entry['path']}: {entry['reason']}" in caplog.text


def test_too_many_broken_images_end_the_build(two_broken, build_config):
  with pytest.raises(errors.DataError, match=r"number 2, and 1 may be.*--max_bad"):
    build.main(build_config(two_broken, max_bad=1))
  folder = build_config(two_broken).output_dir
  assert not os.path.exists(os.path.join(folder, "manifest.json"))
  build.main(build_config(two_broken, max_bad=2))
  assert manifest.load(folder).splits["train"].records == 6


def test_a_set_of_broken_images_only_is_an_error(vggface2_dir, build_config):
  for path in vggface2_dir.glob("*/*.jpg"):
    path.write_bytes(b"")
  with pytest.raises(errors.DataError, match=r"no image below .* could be read"):
    build.main(build_config(vggface2_dir))


@pytest.fixture
def stopping_after(monkeypatch):
  """Makes a build break off after so many shards."""

  class StoppedError(Exception):
    pass

  def stop_after(shards):
    note, noted = state.BuildState.mark_finished, []

    def note_or_stop(self, finished):
      if len(noted) == shards:
        raise StoppedError
      noted.append(finished)
      note(self, finished)

    monkeypatch.setattr(state.BuildState, "mark_finished", note_or_stop)
    return StoppedError

  return stop_after


def test_a_build_continues_with_the_unfinished_shards(
  two_broken, build_config, tmp_path, stopping_after, monkeypatch
):
  undisturbed = build_into(
    build_config(two_broken, output_dir=str(tmp_path / "whole"), num_shards=4)
  )
  config = build_config(two_broken, num_shards=4)
  with monkeypatch.context(), pytest.raises(stopping_after(2)):
    build.main(config)
  monkeypatch.undo()
  first = pathlib.Path(config.output_dir, "train-00000-of-00004.tfrecord")
  last = pathlib.Path(config.output_dir, "train-00003-of-00004.tfrecord")
  assert first.exists()
  assert not last.exists()
  written_at = first.stat().st_mtime_ns
  build.main(config)
  assert first.stat().st_mtime_ns == written_at
  assert folder_bytes(config.output_dir) == folder_bytes(undisturbed)


def test_a_finished_build_says_so_and_changes_nothing(
  vggface2_dir, build_config, caplog
):
  caplog.set_level("INFO", logger="absl")
  config = build_config(vggface2_dir, val_fraction=0.3)
  build.main(config)
  assert "8 images of 3 identities; shards: 2 train, 1 val; the" in caplog.text
  times = {
    path: path.stat().st_mtime_ns
    for path in pathlib.Path(config.output_dir).rglob("*")
    if path.is_file()
  }
  build.main(config)
  assert f"{config.output_dir} is finished; nothing to do" in caplog.text
  assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_deleted_shard_is_written_again_as_it_was(vggface2_dir, build_config):
  config = build_config(vggface2_dir)
  before = folder_bytes(build_into(config))
  os.remove(os.path.join(config.output_dir, "train-00001-of-00002.tfrecord"))
  build.main(config)
  assert folder_bytes(config.output_dir) == before


def test_only_the_shards_asked_for_are_written(vggface2_dir, build_config, caplog):
  caplog.set_level("INFO", logger="absl")
  config = build_config(vggface2_dir, num_shards=3, only_shards="0,2")
  build.main(config)
  names = folder_bytes(config.output_dir)
  assert "train-00000-of-00003.tfrecord" in names
  assert "train-00001-of-00003.tfrecord" not in names
  assert "manifest.json" not in names
  assert "1 shards remain" in caplog.text
  build.main(build_config(vggface2_dir, num_shards=3, only_shards="1"))
  assert "manifest.json" in folder_bytes(config.output_dir)


def test_a_corrupt_shard_is_rebuilt_as_the_error_says(vggface2_dir, build_config):
  config = build_config(vggface2_dir)
  before = folder_bytes(build_into(config))
  path = pathlib.Path(config.output_dir, "train-00001-of-00002.tfrecord")
  files.flip_byte(path, 200)
  problem = next(verify.verify(config.output_dir, verify.Totals()))
  assert str(problem).endswith("rebuild this shard with --only_shards=1")
  build.main(build_config(vggface2_dir, only_shards="1"))
  assert folder_bytes(config.output_dir) == before


@pytest.mark.parametrize("text", ["x", "1,", "5"])
def test_shards_that_are_none_are_refused(vggface2_dir, build_config, text):
  with pytest.raises(errors.UsageError, match="--only_shards"):
    build.main(build_config(vggface2_dir, only_shards=text))


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"image_size": 160}, "image_size: 112 -> 160"),
    ({"quality": 90}, "quality: 95 -> 90"),
    ({"seed": 3}, "seed: 0 -> 3"),
    ({"num_shards": 3}, r"shards: .*2.* -> .*3"),
    ({"val_fraction": 0.3}, "val_fraction: 0.0 -> 0.3"),
    ({"landmarks": "none"}, "input_crc32c"),
  ],
)
def test_other_settings_in_the_same_folder_are_refused(
  vggface2_dir, build_config, changes, reason
):
  folder = build_into(build_config(vggface2_dir))
  before = folder_bytes(folder)
  with pytest.raises(errors.ConfigError, match=reason):
    build.main(build_config(vggface2_dir, **changes))
  assert folder_bytes(folder) == before


def test_a_folder_of_strange_shards_is_refused(vggface2_dir, build_config):
  config = build_config(vggface2_dir)
  os.makedirs(config.output_dir)
  pathlib.Path(config.output_dir, "train-00000-of-00002.tfrecord").touch()
  with pytest.raises(errors.ConfigError, match="not the settings it was built with"):
    build.main(config)


def test_people_of_lfw_are_reported(vggface2_dir, build_config, caplog):
  caplog.set_level("INFO", logger="absl")
  names = vggface2_dir.parent / "pairs.txt"
  names.write_text("1\nAda_Lovelace\t1\t2\nAda_Lovelace\t1\tCher\t1\n")
  folder = build_into(build_config(vggface2_dir, lfw_names=str(names)))
  assert manifest.load(folder).source["lfw_overlap"] == ["n000001"]
  assert "n000001 (Ada_Lovelace) is also in LFW" in caplog.text
  assert "1 of 3 identities are also in LFW" in caplog.text


def test_the_tables_beside_the_folder_can_be_ignored(vggface2_dir, build_config):
  folder = build_into(
    build_config(vggface2_dir, landmarks="none", identity_meta="none")
  )
  made = manifest.load(folder)
  assert made.alignment == {"template": "centre_crop", "images": {"centre_crop": 8}}
  assert made.aligned_by == "centre_crop"
  assert made.identity_names == {}


def test_shards_in_a_bucket_are_those_on_a_disk(vggface2_dir, build_config, bucket):
  from facedist import storage

  local = folder_bytes(build_into(build_config(vggface2_dir)))
  folder = build_into(build_config(vggface2_dir, output_dir=f"{bucket}/shards"))
  names = [name for name in storage.list_names(folder) if name != state.FOLDER]
  assert names == sorted(name for name in local if not name.startswith(state.FOLDER))
  assert all(storage.read_bytes(f"{folder}/{name}") == local[name] for name in names)
  verify.main(verify.VerifyConfig(data_dir=folder))
  storage.remove(f"{folder}/train-00001-of-00002.tfrecord")
  with pytest.raises(errors.DataError, match="1 problem"):
    verify.main(verify.VerifyConfig(data_dir=folder))
  build.main(build_config(vggface2_dir, output_dir=folder))
  verify.main(verify.VerifyConfig(data_dir=folder))


def lfw_config(build_config, lfw_dir, **changes):
  return build_config(lfw_dir, **({"dataset": "lfw", "num_shards": None} | changes))


def test_a_verification_set_has_exactly_the_pairs_listed(lfw_dir, build_config):
  folder = build_into(lfw_config(build_config, lfw_dir))
  made = manifest.load(folder)
  assert made.kind == "verification"
  assert (made.pairs.pairs, made.pairs.folds) == (4, 2)
  images = read_all(folder, "images")
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
  assert list(verify.verify(folder, verify.Totals())) == []


def test_images_that_are_aligned_keep_their_bytes(lfw_dir, build_config):
  folder = build_into(lfw_config(build_config, lfw_dir))
  for record in read_all(folder, "images"):
    assert record.jpeg == (lfw_dir / record.filename).read_bytes()
  made = manifest.load(folder)
  assert made.alignment["images"] == {"source_bytes_kept": 6}
  assert made.aligned_by == manifest.AS_GIVEN


def test_images_of_another_size_are_cut_from_the_centre_with_a_warning(
  lfw_dir, build_config, caplog
):
  caplog.set_level(logging.INFO, logger="absl")
  folder = build_into(lfw_config(build_config, lfw_dir, image_size=96))
  assert "alignment: 6 cut from the centre" in caplog.text
  assert "6 of 6 images were cut from the centre" in caplog.text
  assert manifest.load(folder).alignment["images"] == {"centre_crop": 6}


def test_a_broken_image_ends_a_verification_set(lfw_dir, build_config):
  (lfw_dir / "Cher" / "Cher_0001.jpg").write_bytes(b"broken")
  with pytest.raises(errors.DataError, match=r"Cher/Cher_0001.jpg: it is cut off"):
    build.main(lfw_config(build_config, lfw_dir))


def test_a_verification_set_needs_pairs_and_leaves_none_out(lfw_dir, build_config):
  with pytest.raises(errors.UsageError, match="--missing_row=skip would break"):
    build.main(lfw_config(build_config, lfw_dir, missing_row="skip"))
  (lfw_dir.parent / "pairs.txt").unlink()
  with pytest.raises(errors.UsageError, match="--pairs is required"):
    build.main(lfw_config(build_config, lfw_dir))


@pytest.mark.slow
def test_a_build_killed_at_any_moment_ends_with_the_same_bytes(
  vggface2_dir, build_config, tmp_path
):
  numbers = range(5, 400)
  source = (vggface2_dir / "n000003" / "0001_01.jpg").read_bytes()
  for number in numbers:
    (vggface2_dir / "n000003" / f"{number:04d}_01.jpg").write_bytes(source)
  changes = {"num_shards": 200, "image_list": "none", "landmarks": "none"}
  whole = build_into(
    build_config(vggface2_dir, output_dir=str(tmp_path / "whole"), **changes)
  )
  config = build_config(vggface2_dir, num_processes=2, **changes)
  done = []
  for wanted in (1, 60, 130):
    done.append(_kill_after(config, wanted))
  assert 0 < done[0] < done[1] < done[2] < 200
  build.main(config)
  assert folder_bytes(config.output_dir) == folder_bytes(whole)


def _kill_after(config: options.BuildConfig, shards: int) -> int:
  """Kills a real build once it has so many shards; returns how many it finished."""
  flags = [f"--{name}={value}" for name, value in vars(config).items() if value]
  command = [sys.executable, "-m", "tfrecords_tools.build", *flags]
  process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
  marker = pathlib.Path(config.output_dir, ".build")
  deadline = time.monotonic() + 120
  while len(list(marker.glob("train-*.json"))) < shards:
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.002)
  process.kill()
  process.wait()
  for path in pathlib.Path(config.output_dir).glob("*.tfrecord"):
    index = path.with_name(shard_index.index_name(path.name))
    assert path.stat().st_size == shard_index.load(str(index))["length"].sum()
  return len(list(marker.glob("train-*.json")))


def test_the_command_ends_with_the_errors_code(tmp_path):
  result = subprocess.run(
    [
      sys.executable,
      "-m",
      "tfrecords_tools.build",
      "--dataset=vggface2",
      f"--input_dir={tmp_path}/no",
      f"--output_dir={tmp_path}/shards",
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 4
  assert f"error: --input_dir={tmp_path}/no is no folder" in result.stderr
  assert not (tmp_path / "shards").exists()


@pytest.mark.real_data
def test_real_faces_are_aligned_and_their_overlap_with_lfw_is_found(
  real_data, build_config, tmp_path
):
  sample = real_data / "vggface2_sample"
  wanted = [
    line
    for line in (sample / "train_list.txt").read_text().splitlines()
    if line.startswith(("n000002/", "n000021/"))
  ][::4]
  chosen = tmp_path / "some.txt"
  chosen.write_text("\n".join(wanted))
  folder = build_into(
    build_config(
      sample / "train",
      image_list=str(chosen),
      lfw_names=str(real_data / "lfw" / "pairs.txt"),
      val_fraction=0.2,
    )
  )
  made = manifest.load(folder)
  assert made.source["lfw_overlap"] == ["n000021"]
  assert made.identity_names == {"n000002": "A_Fine_Frenzy", "n000021": "Aaron_Tippin"}
  assert sum(split.records for split in made.splits.values()) == len(wanted) == 30
  assert list(verify.verify(folder, verify.Totals())) == []
  json.loads(pathlib.Path(folder, "manifest.json").read_text())


@pytest.mark.parametrize("kind", ["x1..x5,y1..y5", "shares", "a point at 0,0"])
def test_landmarks_that_are_no_faces_end_the_build(vggface2_dir, build_config, kind):
  table = vggface2_dir.parent / "loose_landmark_train.csv"
  header, *rows = table.read_text().splitlines()
  written = [header]
  for row in rows:
    name, *texts = row.split(",")
    values = [float(text) for text in texts]
    if kind == "shares":
      values = [value / 80 for value in values]
    elif kind == "a point at 0,0":
      values[:2] = 0.0, 0.0
    else:
      values = values[0::2] + values[1::2]
    written.append(",".join([name, *map(str, values)]))
  table.write_text("\n".join(written))
  with pytest.raises(
    errors.DataError, match=r"4 of 4 images cannot be a face's.*x1,y1"
  ):
    build.main(build_config(vggface2_dir))
