"""A missing or forbidden bucket is not corrupt data: no code skips its objects."""

import pathlib
from collections.abc import Callable

import pytest

from facedist import embed, errors, evaluate, storage
from facedist.data import image_source
from facedist.data.shards import manifest
from facedist.evaluation import evaluator
from tests import buckets, noise_sets
from tfrecords_tools import verify
from tfrecords_tools.validation import pictures, scan

SHUT = {  # and 401, see tests/facedist/storage/test_credentials.py
  "403": (403, "trainer lacks storage.objects.get", "permission denied"),
  "no bucket": (404, "The specified bucket does not exist.", "there is no bucket"),
  "unpaid": (400, "Bucket is a requester pays bucket", "the bucket's requester pays"),
}

EMBED = embed.EmbedConfig(workdir="run", input="gs://nobody/s", output="a.json")


@pytest.fixture
def shards(bucket: buckets.Bucket) -> str:
  """A set in the bucket."""
  noise_sets.write(f"{bucket}/shards", identities=2, images=2, size=32, shards=2)
  return f"{bucket}/shards"


def embed_a_folder(shards: str) -> object:
  loaders = image_source.folder_loaders("gs://faces/images", image_size=8)
  return list(image_source.load_in_order(loaders, num_threads=1, ahead=1))


def draw_a_record(shards: str) -> object:
  path = manifest.load(shards).split("train", shards).shards[0].path(shards)
  place = scan.RecordPlace(path, 0, 20, 0)
  return pictures.read_face(place, image_size=32, caption=None)


def verify_the_set(shards: str) -> object:
  return list(verify.verify(shards, verify.Totals(), num_processes=1))


@pytest.mark.parametrize("shut", SHUT)
@pytest.mark.parametrize(
  ("command", "lies_at"),
  [
    (embed_a_folder, "*.jpg"),
    (draw_a_record, "*.tfrecord"),
    (verify_the_set, "*.tfrecord"),
    (verify_the_set, "*.index.npy"),
    (verify_the_set, "*/manifest.json"),
  ],
)
def test_what_skips_damage_stops_at_a_bucket_that_is_shut(
  bucket: buckets.Bucket, shards: str, command: Callable, lies_at: str, shut: str
):
  storage.write_bytes(f"{bucket}/images/a/1.jpg", b"no image")
  assert command(shards) is not None  # and does not raise
  status, message, said = SHUT[shut]
  bucket.faults.always(status=status, message=message, matching=lies_at)
  with pytest.raises(errors.AccessError, match=said) as caught:
    command(shards)
  assert "rebuild" not in str(caught.value)
  assert "\n" not in str(caught.value)
  assert caught.value.exit_code == errors.ExitCode.DATA


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
  "command",
  [
    lambda: manifest.load("gs://nobody/s"),
    lambda: evaluator.wait_for_run("gs://nobody/s", timeout_seconds=9, poll_seconds=9),
    lambda: evaluator.find_checkpoint("gs://nobody/s", None),
    lambda: evaluate.load_verification_sets("gs://nobody/s", "cache", cache_gb=1.0),
    lambda: embed.open_input(EMBED, 8),
    lambda: list(verify.verify("gs://nobody/s", verify.Totals())),
  ],
)
def test_a_bucket_that_is_not_there_is_said_at_once(
  command: Callable, tmp_path: pathlib.Path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  line = "there is no bucket gs://nobody; create it or check its spelling"
  with pytest.raises(errors.AccessError, match=line):
    command()
