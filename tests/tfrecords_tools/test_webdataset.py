"""WebDataset's tar files, written here with tarfile alone."""

import dataclasses
import io
import json
import shutil
import tarfile

import numpy as np
import pytest

from facedist import errors, storage
from facedist.data.readers import local_reader
from tests.tfrecords_tools import folders
from tests.tfrecords_tools.conftest import draw_image, jpeg_of
from tfrecords_tools import build, verify
from tfrecords_tools.sources import webdataset

JPEGS = [jpeg_of(draw_image(seed, 112, 112)) for seed in range(6)]


@pytest.fixture
def written(tmp_path):
  """Writes a tar file of members by name, in their order."""
  (tmp_path / "tars").mkdir()

  def write(members, name="train-000.tar"):
    with tarfile.open(tmp_path / "tars" / name, "w") as archive:
      for member, content in members.items():
        info = tarfile.TarInfo(member)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return str(tmp_path / "tars" / name)

  return write


def read(input_dir):
  """Returns each image's path and its bytes, and the source."""
  source = webdataset.read(input_dir)
  found = {
    path: storage.read_range(
      source.origins[row["origin"]], int(row["start"]), int(row["length"])
    )
    for group in source.groups
    for path, row in zip(group.paths, group.rows, strict=True)
  }
  return found, source


def test_labels_of_any_kind_and_images_of_any_kind(written):
  members = {
    **{"./a/000.jpg": b"0", "./a/000.cls": b"12\n"},
    "b/000.json": b'{"label": "Anna Lee", "box": [1]}',
    **{"b/000.PNG": b"1", "b/000.txt": b"a caption"},
    **{"c.cls": b"Bo", "c.json": b'{"label": 3}', "c.jpeg": b"2"},
    **{"._d.cls": b"\0\5", "d.v2.jpg": b"3", "d.cls": b"7", "e.cls": b"7"},
  }
  found, source = read(written(members))
  assert found == {
    "0000012/train-000/a/000.jpg": b"0",
    "Anna Lee/train-000/b/000.PNG": b"1",
    "Bo/train-000/c.jpeg": b"2",
    "0000007/train-000/d.v2.jpg": b"3",
  }
  assert source.left_out == {"files ending in .txt": 1, "labels without an image": 1}


def test_labels_and_bytes_are_kept_from_a_range_of_files(written, build_config, bucket):
  labels = [10, 2, 2, 10, 0, 1]  # as text 10 would come before 2
  for number in range(2):
    members = {}
    for place in range(3):  # the same keys in both files
      members[f"{place:05d}.jpg"] = JPEGS[3 * number + place]
      members[f"{place:05d}.cls"] = b"%d" % labels[3 * number + place]
    path = written(members, f"train-{number:03d}.tar")
    storage.upload(path, f"{bucket}/tars/train-{number:03d}.tar")
  folder = path.rpartition("/")[0]
  changes = {"dataset": "webdataset", "num_shards": 1}
  config = build_config(f"{folder}/train-{{000..001}}.tar", **changes)
  build.main(config)
  verify.main(verify.VerifyConfig(data_dir=config.output_dir))
  opened = local_reader.open_reader(config.output_dir, "train")
  assert opened.manifest.identities == ("0000000", "0000001", "0000002", "0000010")
  jpegs, found = opened.read(np.arange(opened.num_records))
  numbers = [(0, 1, 2, 10)[label] for label in found]
  expected = dict(zip(JPEGS, labels, strict=True))
  assert dict(zip(map(bytes, jpegs), numbers, strict=True)) == expected
  whole = folders.files_of(config.output_dir)
  for source in (
    folder,
    f"{folder}/train-*.tar",
    f"{bucket}/tars/train-{{000..001}}.tar",
  ):
    shutil.rmtree(config.output_dir)
    build.main(dataclasses.replace(config, input_dir=source))
    assert folders.files_of(config.output_dir) == whole


def test_ranges_are_expanded_in_every_place():
  assert webdataset.archives_of("/a{1..2}/b-{08..10}.tar,/c.tar") == [
    *("/a1/b-08.tar", "/a1/b-09.tar", "/a1/b-10.tar"),
    *("/a2/b-08.tar", "/a2/b-09.tar", "/a2/b-10.tar"),
    "/c.tar",
  ]


@pytest.mark.parametrize("name", ["a-{9..3}.tar", "a-{0..999}-{0..9999}.tar"])
def test_ranges_that_run_backwards_or_are_too_large_are_refused(name):
  with pytest.raises(errors.DataError, match="must run from the smaller"):
    webdataset.archives_of(name)


@pytest.mark.parametrize(
  ("members", "words"),
  [
    ({"a.jpg": b"0"}, r"a.jpg has no label; put a.cls next to it"),
    ({"a.jpg": b"0", "b.cls": b"1", "a.cls": b"1"}, "a.jpg has no label"),
    ({"a.jpg": b"0", "a.png": b"1", "a.cls": b"1"}, "a.jpg and a.png are two images"),
    ({"a.jpg": b"0", "a.cls": b" \n"}, "a.cls has the label ''"),
    ({"a.jpg": b"0", "a.cls": b"../x"}, "a.cls has the label '../x'"),
    ({"a.jpg": b"0", "a.cls": b"x\ny"}, r"a.cls has the label 'x\\ny'"),
    ({"a.jpg": b"0", "a.cls": b"\xff\xfe"}, "a.cls is no label"),
    ({"a.jpg": b"0", "a.cls": b"9" * 5000}, "a.cls has the label '9"),
    ({"a.jpg": b"0", "a.json": b"[" * 9**5}, "a.json is no label"),
    ({"a.jpg": b"0", "a.json": json.dumps({"label": [1]}).encode()}, "the label ''"),
    ({"a.jpg": b"0", "a.cls": bytes(2**20 + 1)}, "1048577 bytes, too many for a label"),
    ({"a.cls": b"0"}, r"has no samples .*labels without an image"),
  ],
)
def test_a_sample_that_is_not_whole_is_named(written, members, words):
  with pytest.raises(errors.DataError, match=words):
    read(written(members))


def test_two_files_of_one_name_with_the_same_keys_are_refused(written, tmp_path):
  path = written({"a.jpg": b"0", "a.cls": b"1"})
  (tmp_path / "more").mkdir()
  shutil.copy(path, tmp_path / "more")
  with pytest.raises(errors.DataError, match=r"train-000/a\.jpg comes twice"):
    read(f"{path},{tmp_path}/more")
