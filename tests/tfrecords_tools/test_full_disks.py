"""Where temporary files do not fit, a command ends in one line with the fix."""

import collections
import tempfile

import numpy as np
import pytest

from facedist import errors, storage
from facedist.data import noise
from facedist.data.shards import shard_index
from facedist.evaluation import embeddings_json
from tfrecords_tools import reports
from tfrecords_tools.builder import writer
from tfrecords_tools.sources import listing
from tfrecords_tools.validation import diff


@pytest.mark.parametrize("is_full", [True, False])
def test_comparing_sets(small_disk, tmp_path, monkeypatch, is_full):
  noise.write_noise_shards(
    str(tmp_path / "a"),
    num_identities=2,
    images_per_identity=20,
    val_images_per_identity=0,
    image_size=16,
    num_shards=1,
    seed=0,
  )
  monkeypatch.setattr(diff, "_known", lambda old, new: frozenset())
  scratch_dir = str(tmp_path / "made" / "here")
  if is_full:
    scratch_dir = str(small_disk)
    (small_disk / "x").write_bytes(bytes(60_000))
  arguments = {"report": None, "num_processes": 1, "scratch_dir": scratch_dir}
  folders = (str(tmp_path / "a"), str(tmp_path / "a"))
  if not is_full:
    assert diff.show(*folders, **arguments) == errors.ExitCode.DONE
    return
  monkeypatch.setattr(listing, "num_files", lambda images: 4)
  with pytest.raises(errors.DataError, match=rf"--scratch_dir={small_disk} is full"):
    diff.show(*folders, **arguments)


def write_shard(folder: str) -> None:
  rows = np.zeros(1, shard_index.INDEX_DTYPE)
  part = writer.WrittenShard(bytes(200_000), rows, collections.Counter(), [])
  writer.write_shard(folder, "train-00000-of-00001.tfrecord", written=[part])


def write_report(folder: str) -> None:
  with reports.new_report(f"{folder}/report.json", {"a": 1}, name="all") as report:
    for _ in range(200):
      report.add("x" * 1000)


def write_embeddings(folder: str) -> None:
  path = f"{folder}/embeddings.json"
  with (
    embeddings_json.output_file(path, overwrite=False) as partial,
    open(partial, "wb") as stream,
  ):
    stream.write(bytes(200_000))


@pytest.mark.parametrize("write", [write_shard, write_report, write_embeddings])
def test_writing_to_a_bucket(small_disk, bucket, monkeypatch, write):
  monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
  with pytest.raises(errors.DataError, match=rf"disk of TMPDIR={small_disk} is full"):
    write(f"{bucket}/made")
  assert storage.list_names(f"{bucket}/made") == []
