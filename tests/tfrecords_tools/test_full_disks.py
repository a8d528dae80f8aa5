"""Where temporary files do not fit, a command ends in one line with the fix."""

import collections
import functools
import tempfile

import numpy as np
import pytest

from facedist import errors, storage
from facedist.data.shards import shard_index
from facedist.evaluation import embeddings_file
from tfrecords_tools import reports
from tfrecords_tools.builder import writer


def write_shard(folder: str) -> None:
  rows = np.zeros(1, shard_index.INDEX_DTYPE)
  part = writer.WrittenChunk(bytes(200_000), rows, collections.Counter(), [])
  writer.write_shard(folder, "train-00000-of-00001.tfrecord", written=[part])


def write_report(folder: str) -> None:
  with reports.new_report(f"{folder}/report.json", {"a": 1}, name="all") as report:
    report.add("x" * 200_000)


def write_embeddings(folder: str, *, suffix: str) -> None:
  path = f"{folder}/embeddings{suffix}"
  with embeddings_file.new_file(path, {}, overwrite=False) as made:
    for number in range(100):
      made.add(path=str(number), identity=None, embedding=np.ones(512, np.float32))


@pytest.mark.parametrize(
  "write",
  [
    write_shard,
    write_report,
    functools.partial(write_embeddings, suffix=".jsonl"),
    functools.partial(write_embeddings, suffix=".npz"),
  ],
)
def test_writing_to_a_bucket(small_disk, bucket, monkeypatch, write):
  monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
  with pytest.raises(errors.DataError, match=rf"disk of TMPDIR={small_disk} is full"):
    write(f"{bucket}/made")
  assert storage.list_names(f"{bucket}/made") == []
