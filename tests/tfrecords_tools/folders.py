"""What lies in a folder of shards."""

import os
import pathlib

from facedist import storage
from facedist.data.shards import manifest, shard_index, tfrecord
from tfrecords_tools import verify


def files_of(folder: str | os.PathLike[str]) -> dict[str, bytes]:
  """Returns every file's bytes by its path below the folder, markers included."""
  root = str(folder)
  return {
    entry.path: storage.read_bytes(storage.join(root, entry.path))
    for entry in storage.walk(root)
  }


def times_of(folder: str | os.PathLike[str]) -> dict[str, int]:
  """Returns when every file was written, in nanoseconds."""
  root = pathlib.Path(folder)
  return {
    str(path.relative_to(root)): path.stat().st_mtime_ns
    for path in root.rglob("*")
    if path.is_file()
  }


def problems_of(folder: str | os.PathLike[str]) -> list[str]:
  """Returns what tfrecords_tools.verify says is wrong."""
  found = verify.verify(str(folder), verify.Totals(), num_processes=1)
  return [str(problem) for problem in found]


def records_of(folder: str, split: str = "train") -> list[tfrecord.Record]:
  """Returns a build's records, by the manifest and the indexes alone."""
  found = []
  for shard in manifest.load(folder).splits[split].shards:
    content = storage.read_bytes(shard.path(folder))
    for row in shard_index.load(shard.index_path(folder)):
      start = int(row["offset"])
      framed = content[start : start + int(row["length"])]
      record = tfrecord.parse(tfrecord.unframe(framed))
      image = int(row["image_offset"])
      assert framed[image : image + int(row["image_length"])] == record.jpeg
      assert row["label"] == record.label
      found.append(record)
  return found


def upload(folder: str | os.PathLike[str], to: str) -> str:
  """Copies a folder to a bucket; returns where it is there."""
  for entry in storage.walk(str(folder)):
    storage.upload(storage.join(str(folder), entry.path), f"{to}/{entry.path}")
  return to
