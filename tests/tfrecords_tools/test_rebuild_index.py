"""Indexes and manifests from shards alone: the builder's, to the byte."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import tracemalloc
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow as tf

from facedist import errors, storage
from facedist.data import image_source, noise
from facedist.data.cache import staged_dataset
from facedist.data.readers import local_reader
from facedist.data.shards import manifest, shard_index, tfrecord
from tests import files, noise_sets
from tests.tfrecords_tools import shard_folders
from tests.tfrecords_tools.folders import files_of, problems_of, times_of
from tfrecords_tools import inspect, rebuild_index, select
from tfrecords_tools.validation import scan

NAME = "train-00001-of-00003.tfrecord"
INDEX = "train-00001-of-00003.index.npy"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  sizes = {"identities": 4, "images": 5, "val_images": 1, "size": 24, "shards": 3}
  noise_sets.write(tmp_path / "shards", **sizes)
  return tmp_path / "shards"


def make(folder: pathlib.Path | str, **settings: Any) -> None:
  rebuild_index.main(
    rebuild_index.IndexConfig(data_dir=str(folder), num_processes=1, **settings)
  )


def problems(caplog: pytest.LogCaptureFixture) -> list[str]:
  return [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]


def row(folder: pathlib.Path, record: int) -> np.void:
  return shard_index.load(str(folder / INDEX))[record]


def test_lost_indexes_and_the_manifest_come_back_to_the_byte(folder):
  before, fingerprint = files_of(folder), manifest.load(str(folder)).fingerprint
  for name in before:
    if not name.endswith(".tfrecord"):
      (folder / name).unlink()
  make(folder, manifest=True, dataset="noise")
  after = files_of(folder)
  assert manifest.load(str(folder)).fingerprint == fingerprint
  made, lost = (json.loads(each.pop("manifest.json")) for each in (after, before))
  assert after == before
  differing = {name for name in lost if made[name] != lost[name]}
  assert differing == {"quality", "alignment", "source"}
  assert made["alignment"] == {"method": "unknown"}


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
  noise_sets.write(f"{bucket}/faces", identities=2, images=3, shards=3)
  before = storage.read_bytes(f"{bucket}/faces/{INDEX}")
  storage.remove(f"{bucket}/faces/{INDEX}")
  make(f"{bucket}/faces")
  assert storage.read_bytes(f"{bucket}/faces/{INDEX}") == before


def test_records_longer_than_a_piece_are_read_and_a_right_index_is_left_alone(
  folder, monkeypatch
):
  before = times_of(folder)
  monkeypatch.setattr(scan, "_PIECE_BYTES", 100)
  make(folder, overwrite=True)
  assert times_of(folder) == before


def test_an_index_that_is_wrong_is_replaced_only_if_asked(folder, caplog):
  before = (folder / INDEX).read_bytes()
  shutil.copy(folder / "train-00000-of-00003.index.npy", folder / INDEX)
  with pytest.raises(errors.DataError, match="1 problems"):
    make(folder)
  assert problems(caplog) == [
    f"{INDEX} is not the index of its shard; --overwrite replaces it"
  ]
  make(folder, overwrite=True)
  assert (folder / INDEX).read_bytes() == before


def test_each_corrupt_record_is_named_and_the_shard_gets_no_index(folder, caplog):
  first, second = (int(row(folder, number)["offset"]) for number in (1, 4))
  for offset in (first, second):
    files.flip_byte(folder / NAME, offset + 60)
  (folder / INDEX).unlink()
  with pytest.raises(errors.DataError, match="3 problems"):
    make(folder)
  assert problems(caplog) == [
    f"{NAME}, record 1 at byte {first}: CRC mismatch",
    f"{NAME}, record 4 at byte {second}: CRC mismatch",
    f"{NAME} gets no index; copy it again, or build it with --only_shards",
  ]
  assert not (folder / INDEX).exists()


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
  last = row(folder, 6)
  start = int(last["offset"])
  os.truncate(folder / NAME, start + left + (int(last["length"]) if left < 0 else 0))
  with pytest.raises(errors.DataError, match="2 problems"):
    make(folder)
  expected = f"{NAME}, record 6 at byte {start}: "
  assert re.fullmatch(re.escape(expected) + reason, problems(caplog)[0])


def test_a_corrupt_length_ends_the_walk_there(folder, caplog):
  offset = int(row(folder, 2)["offset"])
  files.flip_byte(folder / NAME, offset + 2)
  with pytest.raises(errors.DataError):
    make(folder)
  named, _ = problems(caplog)
  assert named == (
    f"{NAME}, record 2 at byte {offset}: the record's length is corrupt, so the "
    "records after it cannot be found"
  )


@pytest.mark.parametrize(
  ("length", "size", "reason"),
  [
    (1 << 60, 112, "the shard is cut off, 112 bytes into a record of"),
    (200 << 20, 201 << 20, "a record of 209715200 bytes, where"),
  ],
)
def test_a_record_longer_than_any_face_costs_no_memory(
  folder, caplog, length, size, reason
):
  header = length.to_bytes(8, "little")
  header += tfrecord.masked_crc(header).to_bytes(4, "little")
  (folder / NAME).write_bytes(header)
  os.truncate(folder / NAME, size)  # without taking room on the disk
  tracemalloc.start()
  with pytest.raises(errors.DataError):
    make(folder)
  assert tracemalloc.get_traced_memory()[1] < 100 << 20
  tracemalloc.stop()
  assert f"record 0 at byte 0: {reason}" in problems(caplog)[0]


def test_a_valid_shard_of_another_build_is_told_from_corruption(folder, caplog):
  for name in (NAME, INDEX):
    shutil.copy(folder / name.replace("00001", "00002"), folder / name)
  with pytest.raises(errors.DataError, match="1 problems"):
    make(folder)
  assert f"{NAME} is valid but of another build" in problems(caplog)[0]


def test_a_missing_shard_leaves_no_manifest(folder, caplog):
  (folder / "manifest.json").unlink()
  (folder / NAME).unlink()
  with pytest.raises(errors.DataError, match="1 problems"):
    make(folder, manifest=True)
  assert problems(caplog) == [f"{NAME} is missing"]
  assert not (folder / "manifest.json").exists()


def test_a_manifest_that_is_there_is_not_replaced_unasked(folder):
  with pytest.raises(errors.UsageError, match="leave --manifest out, or add --over"):
    make(folder, manifest=True)
  make(folder, manifest=True, overwrite=True)
  assert manifest.load(str(folder)).dataset == "unknown"


def test_a_selection_is_refused(folder):
  selection = dataclasses.replace(manifest.load(str(folder)), selection={})
  manifest.save(selection, str(folder))
  with pytest.raises(errors.UsageError, match="is a selection"):
    make(folder)


Features = dict[str, bytes | int]


def write_records(folder: pathlib.Path, records: Iterable[Features]) -> None:
  """Writes a shard as TensorFlow does."""
  folder.mkdir(exist_ok=True)
  path = str(folder / "train-00000-of-00001.tfrecord")
  with tf.io.TFRecordWriter(path) as writer:
    for record in records:
      made = {
        name: tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        if isinstance(value, int)
        else tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        for name, value in record.items()
      }
      example = tf.train.Example(features=tf.train.Features(feature=made))
      writer.write(example.SerializeToString())


def test_shards_that_tensorflow_wrote_are_read_after_it(tmp_path):
  jpegs = [shard_folders.face(number) for number in range(6)]
  write_records(
    tmp_path,
    (
      {
        "zeta": number,
        "image/class/label": number % 3,
        "image/encoded": jpegs[number],
        "image/height": 16,
      }
      for number in range(6)
    ),
  )
  make(tmp_path, manifest=True)
  opened = local_reader.open_reader(str(tmp_path), "train")
  found, labels = opened.read(np.arange(6))
  assert found == jpegs
  assert labels.tolist() == [0, 1, 2, 0, 1, 2]
  assert opened.manifest.identities == ("label0000000", "label0000001", "label0000002")
  assert opened.read_batch(np.arange(6))[0].shape == (6, 16, 16, 3)


@pytest.mark.parametrize(
  ("features", "reason"),
  [
    ({}, "not a face record (it has no image/encoded"),
    ({"image/encoded": b"GIF89a"}, "not a JPEG (it is a GIF"),
    (
      {"image/class/label": -1, "image/encoded": shard_folders.face(0)},
      "label -1 is not in [0, 2^31)",
    ),
  ],
)
def test_records_that_are_no_labelled_jpegs_are_named(
  tmp_path, caplog, features, reason
):
  write_records(tmp_path, [{"image/class/label": 0} | features])
  with pytest.raises(errors.DataError):
    make(tmp_path)
  assert f"record 0 at byte 0: {reason}" in problems(caplog)[0]


FOREIGN = {
  "no text and no file name": (0, 1, 2, None),
  "labels from one, texts in another order": (1, 2, 3, ("c", "a", "b")),
  "gaps between labels": (0, 5, 10, None),
  "a label as large as a record's id": (0, 1, 69_003_070, None),
  "two labels of one text": (0, 1, 2, ("Anna", "Anna", "Bo")),
  "Latin-1 text": (4, 3, 9, ("Zo\u00eb", "J\u00fcrgen", "Zo\u00eb Anna")),
}


def write_foreign(folder: pathlib.Path, kind: str) -> list[int]:
  """Writes nine records of three labels; returns their labels."""
  *of_three, texts = FOREIGN[kind]
  labels, records = of_three * 3, []
  for number, label in enumerate(labels):
    face: Features = {
      "image/class/label": label,
      "image/encoded": shard_folders.face(number),
    }
    if texts is not None:
      face["image/class/text"] = texts[number % 3].encode("latin-1")
    records.append(face)
  write_records(folder, records)
  return labels


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_the_index_takes_of_others_all_commands_take(tmp_path, caplog, kind):
  folder, selected = str(tmp_path / "shards"), str(tmp_path / "selected")
  labels = write_foreign(tmp_path / "shards", kind)
  make(folder, manifest=True)
  made = manifest.load(folder)
  assert made.num_identities == 3
  assert list(made.identities) == sorted(made.identities)
  make(folder)  # the indexes are right as they are
  assert problems_of(folder) == []
  select.main(
    select.SelectConfig(input_dirs=folder, output_dir=selected, duplicates="drop")
  )
  assert problems_of(selected) == []
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
  folder = tmp_path / "shards"
  write_foreign(folder, "gaps between labels")
  make(folder, manifest=True)
  staged = staged_dataset.stage(str(folder), str(tmp_path / "cache"))
  faces = [load() for load in image_source.loaders(staged, "train", image_size=16)]
  assert [(face.path, face.identity) for face in faces[:3]] == [
    ("train-00000-of-00001.tfrecord/0", "label0000000"),
    ("train-00000-of-00001.tfrecord/1", "label0000005"),
    ("train-00000-of-00001.tfrecord/2", "label0000010"),
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
  (folder / NAME).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid 0")
  if compression is not None:
    with tf.io.TFRecordWriter(str(folder / NAME), compression) as writer:
      writer.write(b"x" * 100)
  with pytest.raises(errors.DataError):
    make(folder)
  (problem,) = problems_of(folder)
  for told in (problems(caplog)[0], problem):
    assert f"{NAME} is " in told
    assert name in told
  with pytest.raises(errors.DataError, match=name):
    local_reader.open_reader(str(folder), "train").read(np.arange(20))


def test_a_shard_of_unusable_records_is_reported_in_a_few_lines(tmp_path, caplog):
  png = cv2.imencode(".png", np.zeros((20, 20, 3), np.uint8))[1].tobytes()
  write_records(tmp_path, ({"label": number, "image": png} for number in range(500)))
  with pytest.raises(errors.DataError):
    make(tmp_path, manifest=True)
  found = problems(caplog)
  assert "record 0 at byte 0: not a JPEG (it is a PNG)" in found[0]
  assert found[3:] == ["train-00000-of-00001.tfrecord: 497 more records cannot be used"]


def test_a_label_has_one_text_or_none(tmp_path, caplog):
  face: Features = {"label": 0, "image": shard_folders.face(0)}
  write_records(tmp_path, [face, face | {"image/class/text": b"Anna"}])
  with pytest.raises(errors.DataError):
    make(tmp_path, manifest=True)
  text = "label 0 is Anna here and without image/class/text before"
  assert text in problems(caplog)[0]


def test_shards_of_other_names_are_told_what_to_be_called(tmp_path, caplog):
  (tmp_path / "train-00000-of-00001").write_bytes(b"")
  with pytest.raises(errors.DataError, match=r"1 files like train-00000-of-00001;"):
    make(tmp_path, manifest=True)
  (tmp_path / "train-00000-of-00001").rename(tmp_path / "ms1m_bin.tfrecord")
  with pytest.raises(errors.DataError):
    make(tmp_path, manifest=True)
  assert "ms1m_bin.tfrecord does not have the name of a shard; rename it" in caplog.text
