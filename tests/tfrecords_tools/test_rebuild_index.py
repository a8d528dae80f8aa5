"""Indexes and manifests from shards alone: the builder's, to the byte."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import tracemalloc

import cv2
import numpy as np
import pytest
import simplejpeg
import tensorflow as tf

from facedist import errors
from facedist.data import image_source, noise
from facedist.data.cache import staged_dataset
from facedist.data.readers import local_reader
from facedist.data.shards import manifest, shard_index, tfrecord
from tests import files, noise_sets
from tfrecords_tools import inspect, rebuild_index, select, verify
from tfrecords_tools.validation import scan


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  noise_sets.write(
    tmp_path / "shards", identities=4, images=5, val_images=1, size=24, shards=3
  )
  return tmp_path / "shards"


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def make(folder: pathlib.Path | str, **settings: object) -> None:
  rebuild_index.main(
    rebuild_index.IndexConfig(data_dir=str(folder), num_processes=1, **settings)
  )


def problems(caplog: pytest.LogCaptureFixture) -> list[str]:
  return [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]


def shard(folder: pathlib.Path, number: int = 1) -> pathlib.Path:
  return folder / f"train-{number:05d}-of-00003.tfrecord"


def row(folder: pathlib.Path, number: int, record: int) -> np.void:
  return shard_index.load(shard_index.index_name(str(shard(folder, number))))[record]


def test_lost_indexes_and_the_manifest_come_back_to_the_byte(folder):
  before = contents(folder)
  for name in before:
    if not name.endswith(".tfrecord"):
      (folder / name).unlink()
  make(folder, manifest=True, dataset="noise")
  after = contents(folder)
  assert after.keys() == before.keys()
  for name in before.keys() - {"manifest.json"}:
    assert after[name] == before[name], name
  made, lost = (json.loads(each["manifest.json"]) for each in (after, before))
  differing = {name for name in lost if made[name] != lost[name]}
  assert differing == {"quality", "alignment", "source"}
  assert made["alignment"] == {"method": "unknown"}
  known = manifest.load(str(folder))
  (folder / "manifest.json").write_bytes(before["manifest.json"])
  assert known.fingerprint == manifest.load(str(folder)).fingerprint


def test_a_verification_set_is_known_by_its_pairs(tmp_path):
  noise.write_noise_verification_set(
    str(tmp_path), num_pairs=6, folds=3, image_size=24, seed=0
  )
  before = manifest.load(str(tmp_path))
  (tmp_path / "manifest.json").unlink()
  make(tmp_path, manifest=True)
  after = manifest.load(str(tmp_path))
  assert (after.kind, after.pairs) == ("verification", before.pairs)
  assert after.splits == before.splits


def test_shards_in_a_bucket_get_their_indexes_there(bucket):
  noise_sets.write(f"{bucket}/faces", identities=2, images=3, shards=2)
  from facedist import storage

  path = f"{bucket}/faces/train-00001-of-00002.index.npy"
  before = storage.read_bytes(path)
  storage.remove(path)
  make(f"{bucket}/faces")
  assert storage.read_bytes(path) == before


def test_a_record_longer_than_a_piece_is_read_in_constant_memory(folder, monkeypatch):
  before = contents(folder)
  monkeypatch.setattr(scan, "_PIECE_BYTES", 100)
  walked = scan.walk_shard(str(shard(folder)))
  assert shard_index.to_bytes(walked.rows) == before["train-00001-of-00003.index.npy"]
  (described,) = (
    each for each in manifest.load(str(folder)).shards if each.name == walked.name
  )
  assert (walked.size, walked.crc32c) == (described.bytes, described.crc32c)


def test_an_index_that_is_right_is_left_alone(folder):
  before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
  make(folder, overwrite=True)
  assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_an_index_that_is_wrong_is_replaced_only_if_asked(folder, caplog):
  path = folder / "train-00001-of-00003.index.npy"
  before = path.read_bytes()
  shutil.copy(folder / "train-00000-of-00003.index.npy", path)
  with pytest.raises(errors.DataError, match="1 problems"):
    make(folder)
  assert problems(caplog) == [
    f"{path.name} is not the index of its shard; --overwrite replaces it"
  ]
  make(folder, overwrite=True)
  assert path.read_bytes() == before


def test_each_corrupt_record_is_named_and_the_shard_gets_no_index(folder, caplog):
  first, second = row(folder, 1, 1), row(folder, 1, 4)
  for corrupt in (first, second):
    files.flip_byte(shard(folder), int(corrupt["offset"]) + 60)
  (folder / "train-00001-of-00003.index.npy").unlink()
  with pytest.raises(errors.DataError, match="3 problems"):
    make(folder)
  name = shard(folder).name
  assert problems(caplog) == [
    f"{name}, record 1 at byte {first['offset']}: CRC mismatch",
    f"{name}, record 4 at byte {second['offset']}: CRC mismatch",
    f"{name} gets no index; copy it again, or build it with --only_shards",
  ]
  assert not (folder / "train-00001-of-00003.index.npy").exists()


@pytest.mark.parametrize(
  ("left", "reason"),
  [
    (-7, r"the shard is cut off, \d+ bytes into a record of \d+"),
    (5, "the shard is cut off, 5 bytes into the record"),
  ],
)
def test_a_shard_that_is_cut_off_is_named_by_record_and_byte(
  folder, caplog, left, reason
):
  last = row(folder, 1, 6)
  start = int(last["offset"])
  os.truncate(shard(folder), start + (left if left > 0 else int(last["length"]) + left))
  with pytest.raises(errors.DataError, match="2 problems"):
    make(folder)
  expected = f"{shard(folder).name}, record 6 at byte {start}: "
  assert problems(caplog)[0].startswith(expected)

  assert re.fullmatch(reason, problems(caplog)[0].removeprefix(expected))


def test_a_corrupt_length_ends_the_walk_there(folder, caplog):
  corrupt = row(folder, 1, 2)
  files.flip_byte(shard(folder), int(corrupt["offset"]) + 2)
  with pytest.raises(errors.DataError):
    make(folder)
  assert problems(caplog)[0] == (
    f"{shard(folder).name}, record 2 at byte {corrupt['offset']}: the record's length "
    "is corrupt, so the records after it cannot be found"
  )
  assert len(problems(caplog)) == 2


def test_a_length_that_lies_costs_no_memory(folder, caplog):
  header = (1 << 60).to_bytes(8, "little")
  header += tfrecord.masked_crc(header).to_bytes(4, "little")
  shard(folder).write_bytes(header + b"x" * 100)
  with pytest.raises(errors.DataError):
    make(folder)
  assert "the shard is cut off, 112 bytes into a record of" in problems(caplog)[0]


def test_a_record_that_no_face_takes_is_not_read_whole(folder, caplog):
  header = (200 << 20).to_bytes(8, "little")
  header += tfrecord.masked_crc(header).to_bytes(4, "little")
  shard(folder).write_bytes(header)
  os.truncate(shard(folder), 201 << 20)  # without taking room on the disk
  tracemalloc.start()
  with pytest.raises(errors.DataError):
    make(folder)
  assert tracemalloc.get_traced_memory()[1] < 100 << 20
  tracemalloc.stop()
  assert "record 0 at byte 0: a record of 209715200 bytes, where" in problems(caplog)[0]


def test_a_valid_shard_of_another_build_is_told_from_corruption(folder, caplog):
  shutil.copy(shard(folder, 2), shard(folder, 1))
  shutil.copy(
    folder / "train-00002-of-00003.index.npy", folder / "train-00001-of-00003.index.npy"
  )
  with pytest.raises(errors.DataError, match="1 problems"):
    make(folder)
  assert (
    "train-00001-of-00003.tfrecord is valid but of another build" in problems(caplog)[0]
  )


def test_a_missing_shard_leaves_no_manifest(folder, caplog):
  (folder / "manifest.json").unlink()
  shard(folder).unlink()
  with pytest.raises(errors.DataError, match="1 problems"):
    make(folder, manifest=True)
  assert problems(caplog) == ["train-00001-of-00003.tfrecord is missing"]
  assert not (folder / "manifest.json").exists()


def test_a_manifest_that_is_there_is_not_replaced_unasked(folder):
  with pytest.raises(
    errors.UsageError, match="leave --manifest out, or add --overwrite"
  ):
    make(folder, manifest=True)
  make(folder, manifest=True, overwrite=True)
  assert manifest.load(str(folder)).dataset == "unknown"


def test_a_selection_is_refused(folder):
  selection = dataclasses.replace(manifest.load(str(folder)), selection={})
  manifest.save(selection, str(folder))
  with pytest.raises(errors.UsageError, match="is a selection"):
    make(folder)


def test_a_folder_without_shards_is_an_error(tmp_path):
  with pytest.raises(errors.DataError, match="has no shards"):
    make(tmp_path)


def example(**features: tf.train.Feature) -> bytes:
  names = {name.replace("_", "/"): feature for name, feature in features.items()}
  return tf.train.Example(features=tf.train.Features(feature=names)).SerializeToString()


def feature(value: bytes | int) -> tf.train.Feature:
  if isinstance(value, int):
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
  return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def jpeg(seed: int) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)
  return simplejpeg.encode_jpeg(pixels)


def test_shards_that_tensorflow_wrote_are_read_after_it(tmp_path):
  with tf.io.TFRecordWriter(str(tmp_path / "train-00000-of-00001.tfrecord")) as writer:
    for number in range(6):
      features = {
        "zeta": feature(number),
        "image_class_label": feature(number % 3),
        "image_encoded": feature(jpeg(number)),
        "image_height": feature(20),
      }
      writer.write(example(**features))
  make(tmp_path, manifest=True)
  opened = local_reader.open_reader(str(tmp_path), "train")
  jpegs, labels = opened.read(np.arange(6))
  assert jpegs == [jpeg(number) for number in range(6)]
  assert labels.tolist() == [0, 1, 2, 0, 1, 2]
  assert opened.manifest.identities == ("label0000000", "label0000001", "label0000002")
  assert opened.read_batch(np.arange(6))[0].shape == (6, 20, 20, 3)


@pytest.mark.parametrize(
  ("features", "reason"),
  [
    ({"image_class_label": feature(0)}, "not a face record .it has no image/encoded"),
    (
      {"image_class_label": feature(0), "image_encoded": feature(b"GIF89a")},
      "not a JPEG .it is a GIF",
    ),
    (
      {"image_class_label": feature(-1), "image_encoded": feature(jpeg(0))},
      r"label -1 is not in \[0, 2\^31\)",
    ),
  ],
)
def test_records_that_are_no_labelled_jpegs_are_named(
  tmp_path, caplog, features, reason
):
  with tf.io.TFRecordWriter(str(tmp_path / "train-00000-of-00001.tfrecord")) as writer:
    writer.write(example(**features))
  with pytest.raises(errors.DataError):
    make(tmp_path)

  assert re.search(f"record 0 at byte 0: {reason}", problems(caplog)[0])


FOREIGN = {
  "no text and no file name": (0, 1, 2, None),
  "labels from one, texts in another order": (1, 2, 3, ("c", "a", "b")),
  "gaps between labels": (0, 5, 10, None),
  "a label as large as a record's id": (0, 1, 69_003_070, None),
  "two labels of one text": (0, 1, 2, ("Anna", "Anna", "Bo")),
  "Latin-1 text": (4, 3, 9, ("Zo\u00eb", "J\u00fcrgen", "Zo\u00eb Anna")),
}


def write_foreign(folder: pathlib.Path, kind: str) -> list[int]:
  """Writes nine records of three labels as TensorFlow does; returns their labels."""
  *labels, texts = FOREIGN[kind]
  folder.mkdir()
  path = str(folder / "train-00000-of-00001.tfrecord")
  with tf.io.TFRecordWriter(path) as writer:
    for number in range(9):
      features = {
        "image_class_label": feature(labels[number % 3]),
        "image_encoded": feature(jpeg(number)),
      }
      if texts is not None:
        features["image_class_text"] = feature(texts[number % 3].encode("latin-1"))
      writer.write(example(**features))
  return [labels[number % 3] for number in range(9)]


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_the_index_takes_of_others_all_commands_take(tmp_path, caplog, kind):
  folder, selected = str(tmp_path / "shards"), str(tmp_path / "selected")
  labels = write_foreign(tmp_path / "shards", kind)
  make(folder, manifest=True)
  made = manifest.load(folder)
  assert made.num_identities == 3
  assert list(made.identities) == sorted(made.identities)
  make(folder)  # the indexes are right as they are
  assert list(verify.verify(folder, verify.Totals(), num_processes=1)) == []
  select.main(
    select.SelectConfig(input_dirs=folder, output_dir=selected, duplicates="drop")
  )
  assert list(verify.verify(selected, verify.Totals(), num_processes=1)) == []
  for each in (folder, selected):
    opened = local_reader.open_reader(each, "train")
    assert len(opened.read_batch(np.arange(9))[0]) == 9
    of_old = dict(zip(labels, opened.read(np.arange(9))[1].tolist(), strict=True))
    assert sorted(of_old.values()) == [0, 1, 2]
    assert opened.labels().tolist() == [of_old[label] for label in labels]
  shown = inspect.InspectConfig(data_dir=folder, pictures=str(tmp_path / "pictures"))
  assert inspect.main(shown) == 0
  assert inspect.main(dataclasses.replace(shown, diff=folder, pictures=None)) == 0
  assert problems(caplog) == []


def test_shards_of_others_are_embedded_under_their_place(tmp_path):
  write_foreign(tmp_path / "shards", "gaps between labels")
  make(tmp_path / "shards", manifest=True)
  staged = staged_dataset.stage(str(tmp_path / "shards"), str(tmp_path / "cache"))
  faces = [load() for load in image_source.loaders(staged, "train", image_size=20)]
  assert [face.path for face in faces[:2]] == [
    "train-00000-of-00001.tfrecord/0",
    "train-00000-of-00001.tfrecord/1",
  ]
  assert [face.identity for face in faces[:3]] == [
    "label0000000",
    "label0000005",
    "label0000010",
  ]


def test_renumbered_labels_are_told_and_lost_indexes_come_back_with_them(
  tmp_path, caplog
):
  folder = tmp_path / "shards"
  write_foreign(folder, "labels from one, texts in another order")
  make(folder)  # with the records' labels, as there is no manifest yet
  index_path = folder / "train-00000-of-00001.index.npy"
  assert shard_index.load(str(index_path))["label"].tolist() == [1, 2, 3] * 3
  make(folder, manifest=True)
  assert "3 labels are renumbered from 0" in caplog.text
  assert manifest.load(str(folder)).identities == ("a", "b", "c")
  assert shard_index.load(str(index_path))["label"].tolist() == [2, 0, 1] * 3
  before = index_path.read_bytes()
  index_path.unlink()
  make(folder)
  assert index_path.read_bytes() == before


@pytest.mark.parametrize(
  ("compression", "name"), [("GZIP", "GZIP"), ("ZLIB", "ZLIB"), (None, "Git LFS")]
)
def test_what_is_no_plain_shard_is_called_what_it_is(folder, caplog, compression, name):
  shard(folder).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
  if compression is not None:
    with tf.io.TFRecordWriter(str(shard(folder)), compression) as writer:
      writer.write(b"x" * 100)
  with pytest.raises(errors.DataError):
    make(folder)
  assert f"{shard(folder).name} is " in problems(caplog)[0]
  assert name in problems(caplog)[0]
  (problem,) = verify.verify(str(folder), verify.Totals(), num_processes=1)
  assert name in str(problem)
  with pytest.raises(errors.DataError, match=name):
    local_reader.open_reader(str(folder), "train").read(np.arange(20))


def test_a_shard_of_unusable_records_is_reported_in_a_few_lines(tmp_path, caplog):
  with tf.io.TFRecordWriter(str(tmp_path / "train-00000-of-00001.tfrecord")) as writer:
    for number in range(500):
      png = cv2.imencode(".png", np.full((20, 20, 3), number % 256, np.uint8))[1]
      features = {"label": feature(number), "image": feature(png.tobytes())}
      writer.write(example(**features))
  with pytest.raises(errors.DataError):
    make(tmp_path, manifest=True)
  found = problems(caplog)
  assert "record 0 at byte 0: not a JPEG (it is a PNG)" in found[0]
  assert found[3:] == ["train-00000-of-00001.tfrecord: 497 more records cannot be used"]


def test_a_label_has_one_text_or_none(tmp_path, caplog):
  with tf.io.TFRecordWriter(str(tmp_path / "train-00000-of-00001.tfrecord")) as writer:
    for text in ({}, {"image_class_text": feature(b"Anna")}):
      features = {"label": feature(0), "image": feature(jpeg(0)), **text}
      writer.write(example(**features))
  with pytest.raises(errors.DataError):
    make(tmp_path, manifest=True)
  assert (
    "label 0 is Anna here and without image/class/text before" in problems(caplog)[0]
  )


def test_shards_of_other_names_are_told_what_to_be_called(tmp_path, caplog):
  (tmp_path / "train-00000-of-00001").write_bytes(b"")
  with pytest.raises(errors.DataError, match=r"1 files like train-00000-of-00001;"):
    make(tmp_path, manifest=True)
  (tmp_path / "train-00000-of-00001").rename(tmp_path / "ms1m_bin.tfrecord")
  with pytest.raises(errors.DataError):
    make(tmp_path, manifest=True)
  assert "ms1m_bin.tfrecord does not have the name of a shard; rename it" in caplog.text
