"""What the checks before training ask of a bucket with many shards."""

import dataclasses

import pytest

from facedist import storage
from facedist.data import manifest, noise
from facedist.preflight import run_checks
from facedist.preflight.findings import Finding
from facedist.training.config import TrainConfig
from tests import buckets

NUM_SHARDS = 48


@pytest.fixture
def settings(bucket: buckets.Bucket) -> TrainConfig:
  """A run on shards in the bucket."""
  noise.write_noise_shards(
    f"{bucket}/shards",
    num_identities=2,
    images_per_identity=NUM_SHARDS,
    val_images_per_identity=0,
    image_size=16,
    num_shards=NUM_SHARDS,
    seed=0,
  )
  bucket.traffic.clear()
  return dataclasses.replace(
    TrainConfig(), data_dir=f"{bucket}/shards", workdir=f"{bucket}/run", global_batch=8
  )


def data_finding(settings: TrainConfig) -> Finding:
  """Returns what is found of the data."""
  found = run_checks.check_run(settings, is_quick=True)
  return next(finding for finding in found if finding.check == "data")


def test_each_shard_of_a_bucket_is_asked_for_once(
  bucket: buckets.Bucket, settings: TrainConfig
):
  text = str(data_finding(settings))
  assert f"all {NUM_SHARDS} shards have their size" in text
  assert bucket.traffic.requests("gs://*.tfrecord") == NUM_SHARDS
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
