"""What the checks before training find of a run, on a disk and in a bucket."""

import dataclasses
import json
import os
import pathlib

import pytest
import tensorflow as tf

from facedist import config, errors, storage
from facedist.data.shards import manifest
from facedist.distributed.cluster import Cluster
from facedist.preflight import checks
from facedist.preflight.checks import Finding
from facedist.training import config as train_config
from facedist.training import sharded_optimizers
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
  files = {"step-00000010.index": b"index", "step-00000010.data-00000-of-00001": b"w"}
  (workdir / "checkpoints").mkdir(parents=True)
  for name, content in files.items():
    (workdir / "checkpoints" / name).write_bytes(content)
  marker = {
    "step": 10,
    "data_fingerprint": manifest.load(shards).fingerprint,
    "files": {
      name: {"bytes": len(content), "crc32c": storage.crc32c_of(content)}
      for name, content in files.items()
    },
  }
  (workdir / "checkpoints/step-00000010.json").write_text(json.dumps(marker))
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
  folder = str(run.data_dir)
  victim = manifest.load(folder).splits["val"].shards[0].path(folder)
  os.remove(victim)
  found = findings_of(run, is_quick=True)["data"]
  assert found.text.startswith(victim)
  assert found.exit_code == errors.ExitCode.DATA


TWO_WORKERS = Cluster(("a:1", "b:1"), 0, origin="TF_CONFIG")


@pytest.mark.parametrize(
  ("changes", "cluster", "text"),
  [
    ({"strategy": "one"}, TWO_WORKERS, "--strategy=one trains in one process, but "),
    ({"strategy": "mirrored"}, TWO_WORKERS, "--strategy=mirrored trains in one "),
    (
      {"strategy": "multiworker", "communication": "nccl"},
      Cluster(("a:1",)),
      "--communication=nccl needs GPUs and there are none",
    ),
    ({"strategy": "multiworker"}, Cluster(), "and nothing describes them"),
    ({"strategy": "multiworker"}, Cluster(left_out="alone; go"), "multiworker: alone"),
  ],
)
def test_flags_that_fit_no_such_cluster_are_told_without_a_device(
  run: TrainConfig,
  monkeypatch: pytest.MonkeyPatch,
  changes: dict[str, str],
  cluster: Cluster,
  text: str,
):
  monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: [])
  settings = dataclasses.replace(run, **changes)
  found = next(checks.check_run(resolve(settings), cluster, is_quick=True))
  assert text in found.text
  assert (found.state, found.exit_code) == ("bad", errors.ExitCode.USAGE)
  assert found.fix


def test_float16_without_a_gpu_is_a_warning(
  run: TrainConfig, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: [])
  half = dataclasses.replace(run, policy="mixed_float16")
  found = checks.check_flags(resolve(half))
  assert found.state == "warning"
  assert "--policy=mixed_float16 is very slow on a CPU" in found.text
  full = dataclasses.replace(run, policy="float32")
  assert checks.check_flags(resolve(full)).state == "ok"


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


@pytest.mark.parametrize("name", sharded_optimizers.ROW_OPTIMIZERS)
def test_rows_have_as_many_slots_as_their_optimizer(name: str):
  numbers = train_config.DEFAULTS[name]
  built = sharded_optimizers.make_row_optimizer(name, numbers, nesterov=False)
  assert len(built.slots) == train_config.SLOTS[name]


def of_images(folder: str, *, identities: int, images: int) -> TrainConfig:
  """Returns a run on a set of so many identities and images of each."""
  noise_sets.write(folder, identities=identities, images=images)
  return TrainConfig(data_dir=folder, workdir=f"{folder}/run", global_batch=2)


def test_one_identity_alone_is_refused(tmp_path: pathlib.Path):
  found = data_finding(of_images(str(tmp_path / "one"), identities=1, images=4))
  assert (found.state, found.exit_code) == ("bad", errors.ExitCode.DATA)
  assert "has 1 identity" in found.text


def test_triplets_without_a_pair_are_refused(tmp_path: pathlib.Path):
  run = of_images(str(tmp_path / "single"), identities=4, images=1)
  found = data_finding(dataclasses.replace(run, metric_loss="triplet_hard"))
  assert (found.state, found.exit_code) == ("bad", errors.ExitCode.DATA)
  assert "none of the 4 images" in found.text


def test_a_single_image_an_identity_is_a_warning(tmp_path: pathlib.Path):
  found = data_finding(of_images(str(tmp_path / "single"), identities=4, images=1))
  assert found.state == "warning"
  assert "fewer than two images an identity" in found.text


def test_a_batch_larger_than_the_set_is_a_warning(tmp_path: pathlib.Path):
  run = of_images(str(tmp_path / "few"), identities=2, images=3)
  found = data_finding(dataclasses.replace(run, global_batch=8))
  assert found.state == "warning"
  assert "--global_batch=8 is more than the 6 images" in found.text
