"""What the checks before training find of a run, on a disk and in a bucket."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest
import tensorflow as tf

from facedist import config, errors, storage
from facedist.data.shards import manifest
from facedist.distributed.cluster import Cluster
from facedist.preflight import checks
from facedist.preflight.checks import Finding
from facedist.training.config import TrainConfig, resolve
from tests import buckets, files, noise_sets

NUM_SHARDS = 48


@pytest.fixture
def settings(bucket: buckets.Bucket) -> TrainConfig:
  """A run on shards in the bucket."""
  noise_sets.write(
    f"{bucket}/shards", identities=2, images=NUM_SHARDS, shards=NUM_SHARDS
  )
  bucket.traffic.clear()
  return dataclasses.replace(
    TrainConfig(), data_dir=f"{bucket}/shards", workdir=f"{bucket}/run", global_batch=8
  )


def data_finding(settings: TrainConfig, *, is_quick: bool = True) -> Finding:
  """Returns what is found of the data."""
  found = checks.check_run(resolve(settings), is_quick=is_quick)
  return next(finding for finding in found if finding.check == "data")


def test_each_shard_of_a_bucket_is_asked_for_once(
  bucket: buckets.Bucket, settings: TrainConfig
):
  text = str(data_finding(settings))
  assert f"all {NUM_SHARDS} shards have their size" in text
  assert bucket.traffic.requests("gs://*.tfrecord") == NUM_SHARDS
  assert bucket.traffic.bytes_read("gs://*.tfrecord") == 0


def test_a_shard_s_checksum_is_asked_of_the_bucket_and_the_shard_not_read(
  bucket: buckets.Bucket, settings: TrainConfig
):
  found = data_finding(settings, is_quick=False)
  assert f"all {NUM_SHARDS} shards have their size and CRC" in found.text
  victim = manifest.load(settings.data_dir).splits["train"].shards[7]
  path = victim.path(settings.data_dir)
  storage.write_bytes(path, bytes(victim.bytes))
  bucket.traffic.clear()
  found = data_finding(settings, is_quick=False)
  assert found.text == f"{path} is corrupt (CRC-32C)"
  assert bucket.traffic.bytes_read("gs://*.tfrecord") == 0


def test_of_several_wrong_shards_the_first_is_named_however_late_its_answer(
  bucket: buckets.Bucket, settings: TrainConfig
):
  shards = manifest.load(settings.data_dir).splits["train"].shards
  for number in (3, 30, 47):
    storage.write_bytes(shards[number].path(settings.data_dir), b"short")
  late = shards[3].path(settings.data_dir)
  bucket.faults.always("delay", matching=late, method="GET", delay_seconds=0.5)
  text = str(data_finding(settings))
  assert f"{late} is cut off: it has 5 bytes" in text


@pytest.fixture
def run(tmp_path: pathlib.Path) -> TrainConfig:
  """A run on a disk: its shards, its config and a checkpoint of step 10."""
  shards, workdir = str(tmp_path / "shards"), tmp_path / "run"
  noise_sets.write(shards, identities=2, images=4, val_images=2, shards=2)
  settings = TrainConfig(
    data_dir=shards, workdir=str(workdir), global_batch=4, full_epochs=8.0
  )
  (workdir / "checkpoints").mkdir(parents=True)
  index = workdir / "checkpoints/step-00000010.index"
  index.write_bytes(b"index")
  facts = {"bytes": 5, "crc32c": storage.crc32c_of(b"index")}
  marker = {
    "step": 10,
    "data_fingerprint": manifest.load(shards).fingerprint,
    "files": {index.name: facts},
  }
  index.with_suffix(".json").write_text(json.dumps(marker))
  (workdir / "config.json").write_text(config.to_json(settings))
  return settings


def findings_of(settings: TrainConfig, *, is_quick: bool = False) -> dict[str, Finding]:
  """Returns what is found of a run, by check."""
  found = checks.check_run(resolve(settings), is_quick=is_quick)
  return {finding.check: finding for finding in found}


def test_a_sound_run_is_told_with_its_data_and_where_it_goes_on(run: TrainConfig):
  found = findings_of(run)
  assert {finding.state for finding in found.values()} == {"ok"}
  assert "8 images of 2 identities, 16 px" in found["data"].text
  shards = len(manifest.load(str(run.data_dir)).shards)
  assert f"all {shards} shards have their size and CRC" in found["data"].text
  assert found["checkpoint"].text == "step-00000010 is whole; the run continues from it"
  assert found["workdir"].text == f"{run.workdir} can be written"


def test_a_shard_whose_bytes_changed_is_found_by_its_checksum(run: TrainConfig):
  victim = pathlib.Path(str(run.data_dir)) / "train-00001-of-00002.tfrecord"
  files.flip_byte(victim, -1)
  found = findings_of(run)["data"]
  assert found.text == f"{victim} is corrupt (CRC-32C)"
  assert (found.fix, found.exit_code) == ("copy it again.", errors.ExitCode.DATA)
  assert findings_of(run, is_quick=True)["data"].state == "ok"  # sizes only


def test_a_shard_of_validation_that_is_missing_is_found(run: TrainConfig):
  (victim,) = pathlib.Path(str(run.data_dir)).glob("val-00000-*.tfrecord")
  victim.unlink()
  found = findings_of(run, is_quick=True)["data"]
  assert found.text.startswith(str(victim))
  assert found.exit_code == errors.ExitCode.DATA


def test_flags_that_do_not_fit_the_cluster_are_told_without_a_device(run: TrainConfig):
  two_workers = Cluster(("a:1", "b:1"), 0, origin="TF_CONFIG")
  settings = resolve(dataclasses.replace(run, strategy="one"))
  found = next(checks.check_run(settings, two_workers, is_quick=True))
  assert "--strategy=one trains in one process, but " in found.text
  assert (found.state, found.exit_code) == ("bad", errors.ExitCode.USAGE)
  assert found.fix


def test_float16_without_a_gpu_is_a_warning(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: [])
  found = checks.check_flags(resolve(TrainConfig(policy="mixed_float16")))
  assert found.state == "warning"
  assert "--policy=mixed_float16 is very slow on a CPU" in found.text
  assert checks.check_flags(resolve(TrainConfig())).state == "ok"


def test_a_corrupt_checkpoint_is_found_by_its_checksum(run: TrainConfig):
  victim = pathlib.Path(str(run.workdir)) / "checkpoints/step-00000010.index"
  files.flip_byte(victim, -1)
  found = findings_of(run)["checkpoint"]
  assert found.text.startswith(f"{victim} is corrupt: its CRC-32C")
  assert found.fix == "remove that marker to continue from the checkpoint before."
  assert found.exit_code == errors.ExitCode.DATA


@pytest.mark.parametrize("is_quick", [True, False])
@pytest.mark.parametrize("content", ["", "{}"])
def test_a_corrupt_marker_is_a_warning_where_the_checkpoint_before_will_do(
  run: TrainConfig, content: str, is_quick: bool
):
  newest = pathlib.Path(str(run.workdir)) / "checkpoints/step-00000020.json"
  newest.write_text(content)
  found = findings_of(run, is_quick=is_quick)["checkpoint"]
  assert found.state == "warning"
  assert found.text.startswith(f"{newest} is corrupt: it ")
  assert "; step-00000010 is " in found.text
  newest.with_name("step-00000010.json").write_text(content)
  assert findings_of(run, is_quick=is_quick)["checkpoint"].exit_code == 4


def test_a_checkpoint_of_other_data_or_another_config_is_told(
  run: TrainConfig, tmp_path: pathlib.Path
):
  other = findings_of(dataclasses.replace(run, embedding_size=7))["checkpoint"]
  assert "holds a run with another config (embedding_size: 512 -> 7)" in other.text
  assert other.exit_code == errors.ExitCode.CONFIG
  assert other.fix
  noise_sets.write(tmp_path / "others", identities=2, images=4, shards=2, seed=1)
  moved = dataclasses.replace(run, data_dir=str(tmp_path / "others"))
  found = findings_of(moved)["checkpoint"]
  assert "step-00000010 was trained on data " in found.text
  assert found.exit_code == errors.ExitCode.DATA
  assert found.fix


@pytest.mark.parametrize(
  ("identities", "images", "changes", "state", "text"),
  [
    (1, 4, {}, "bad", "has 1 identity"),
    (4, 1, {"metric_loss": "triplet_hard"}, "bad", "none of the 4 images"),
    (4, 1, {}, "warning", "fewer than two images an identity"),
    (2, 3, {"global_batch": 8}, "warning", "_batch=8 is more than the 6 images"),
  ],
)
def test_a_set_too_small_to_learn_from_is_told(
  identities: int,
  images: int,
  changes: dict[str, Any],
  state: str,
  text: str,
  tmp_path: pathlib.Path,
):
  noise_sets.write(tmp_path, identities=identities, images=images)
  run = TrainConfig(data_dir=str(tmp_path), global_batch=2)
  found = data_finding(dataclasses.replace(run, **changes))
  assert found.state == state
  assert text in found.text
  assert checks.exit_code([found]) == (errors.ExitCode.DATA if state == "bad" else 0)
