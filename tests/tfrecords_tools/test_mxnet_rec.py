"""InsightFace's training sets, written here from the format's description."""

import struct

import numpy as np
import pytest

from facedist import errors, storage
from facedist.data.readers import local_reader
from tests.tfrecords_tools import folders
from tests.tfrecords_tools.conftest import draw_image, jpeg_of
from tfrecords_tools import build, inspect, verify
from tfrecords_tools.sources import mxnet_rec

MAGIC = b"\x0a\x23\xd7\xce"


def framed(content):
  """Returns a record as RecordIO writes it: cut at each aligned magic number."""
  cuts = [at for at in range(0, len(content) - 3, 4) if content[at : at + 4] == MAGIC]
  starts, ends = [0, *(at + 4 for at in cuts)], [*cuts, len(content)]
  kinds = [1, *[2] * (len(cuts) - 1), 3] if cuts else [0]
  made = b""
  for kind, start, end in zip(kinds, starts, ends, strict=True):
    made += MAGIC + struct.pack("<I", kind << 29 | end - start) + content[start:end]
    made += b"\0" * (-(end - start) % 4)
  return made


def packed(label, image=b"", *, number=0, flag=None):
  """Returns a record's content; a list of labels goes behind the IRHeader."""
  if isinstance(label, list):
    head = struct.pack("<IfQQ", flag or len(label), 0.0, number, 0)
    return head + np.array(label, "<f4").tobytes() + image
  return struct.pack("<IfQQ", flag or 0, label, number, 0) + image


def with_comment(jpeg, comment):
  """Returns a JPEG with a comment at its byte 6, which a record aligns to 4 bytes."""
  length = struct.pack(">H", len(comment) + 4)
  return jpeg[:2] + b"\xff\xfe" + length + b"\0\0" + comment + jpeg[2:]


JPEGS = [jpeg_of(draw_image(seed, 112, 112)) for seed in range(6)]
JPEGS[1] = with_comment(JPEGS[1], MAGIC)
JPEGS[2] = with_comment(JPEGS[2], MAGIC * 3 + b"abcd" + MAGIC + b"x")
JPEGS[3] = with_comment(JPEGS[3], b"x" + MAGIC)  # not aligned: stays in one part
LABELS = [1, 0, 2, 1, 0, 0]


@pytest.fixture
def written(tmp_path):
  """Writes records of (key, content) and what lies beside them; returns the .rec."""
  folder = tmp_path / "faces"
  folder.mkdir()

  def write(records, *, properties=None):
    content, lines = b"", ""
    for key, record in records:
      lines += f"{key}\t{len(content)}\n"
      content += framed(record)
    (folder / "train.rec").write_bytes(content)
    (folder / "train.idx").write_text(lines)
    if properties:
      (folder / "property").write_text(properties)
    return folder / "train.rec"

  return write


def read(path):
  """Returns the source and the paths of all images."""
  source = mxnet_rec.read(str(path), image_size=112)
  return source, [image for group in source.groups for image in group.paths]


def images_of(labels=LABELS):
  """Returns records 1 to 6, as im2rec writes them without an identity header."""
  return [
    (number, packed(label, jpeg, number=number))
    for number, (label, jpeg) in enumerate(zip(labels, JPEGS, strict=True), 1)
  ]


def with_identities():
  """Returns InsightFace's own order: images, the identity header, the identities."""
  images = images_of([[float(label), 1.0] for label in sorted(LABELS)])
  ranges = [[1.0, 4.0], [4.0, 6.0], [6.0, 7.0]]
  return [
    *images,
    (0, packed([7.0, 10.0], flag=2)),
    *((7 + i, packed(r, number=7 + i)) for i, r in enumerate(ranges)),
  ]


def built(build_config, path, **changes):
  config = build_config(path, dataset="rec", num_shards=1, **changes)
  code = build.main(config)
  opened = local_reader.open_reader(config.output_dir, "train")
  jpegs, labels = opened.read(np.arange(opened.num_records))
  found = {bytes(jpeg): label for jpeg, label in zip(jpegs, labels, strict=True)}
  return config.output_dir, code, found


def test_images_and_labels_are_kept_with_identity_records_left_out(
  written, build_config, tmp_path
):
  path = written(with_identities(), properties="3,112,112\n")
  output_dir, code, found = built(build_config, path.parent)
  assert code == errors.ExitCode.DONE
  assert found == dict(zip(JPEGS, sorted(LABELS), strict=True))
  verify.main(verify.VerifyConfig(data_dir=output_dir))  # raises what is wrong
  report = tmp_path / "seen.json"
  inspect.main(inspect.InspectConfig(data_dir=output_dir, report=str(report)))
  assert '"0000002"' in report.read_text()


def test_labels_in_any_order_without_identity_header(written, build_config):
  _, _, found = built(build_config, written(images_of()))
  assert found == dict(zip(JPEGS, LABELS, strict=True))


def test_without_an_idx_all_records_are_found_and_named_by_their_ids(written):
  path = written(with_identities())
  _, paths = read(path)
  assert paths[0] == "0000000/00000001.jpg"
  assert len(paths) == 6
  path.with_suffix(".idx").unlink()
  assert read(path)[1] == paths


def test_records_whose_ids_are_not_set_are_named_by_their_places(written):
  path = written([(n, packed(0, jpeg)) for n, jpeg in enumerate(JPEGS)])
  path.with_suffix(".idx").unlink()
  assert read(path)[1] == [f"0000000/{number:08d}.jpg" for number in range(6)]


def test_a_magic_number_in_the_ir_header_itself_is_put_back(written, build_config):
  number = int.from_bytes(MAGIC, "little")
  record = packed(0, JPEGS[0], number=number)  # the first part has 8 bytes
  _, _, found = built(build_config, written([(1, record), *images_of()[1:]]))
  assert found[JPEGS[0]] == 0
  assert len(found) == 6


def test_records_that_the_idx_does_not_list_are_left_out(written):
  path = written(images_of())
  lines = path.with_suffix(".idx").read_text().splitlines()
  path.with_suffix(".idx").write_text("\n".join(reversed(lines[1:])))
  source, paths = read(path)
  assert len(paths) == 5
  assert source.left_out == {"records that the .idx does not list": 1}


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda rec: rec[:-30], "it is cut off; copy it again"),
    (lambda rec: rec + rec[:20], "it is cut off; copy it again"),
    (lambda rec: rec + rec[:5], "the file is cut off"),
    (lambda rec: bytes(4) + rec, "at byte 0: it starts with 00000000, not with"),
    (lambda rec: rec + framed(b"short"), "its 5 bytes are no IRHeader"),
    (lambda rec: rec + framed(packed(1.5, b"x")), "the label is 1.5, but labels are"),
    (lambda rec: rec + framed(packed(-1, b"x")), "the label is -1, but"),
    (lambda rec: rec + framed(packed(float("nan"), b"x")), "the label is nan, but"),
    (lambda rec: rec + framed(packed(0, b"x", flag=99)), "do not hold 99 labels"),
    (lambda rec: rec + MAGIC + b"\0\0\0\x60", "is of kind 3, which cannot"),
    (lambda rec: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    (lambda rec: framed(packed([1.0, 2.0])), "has no image in any record"),
  ],
)
def test_a_damaged_file_is_named_with_the_byte(written, change, words):
  path = written(images_of())
  path.with_suffix(".idx").unlink()
  path.write_bytes(change(path.read_bytes()))
  with pytest.raises(errors.DataError, match=words) as raised:
    read(path)
  assert "train.rec" in str(raised.value)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda lines: ["1\t4", *lines[1:]], "has record 1 at byte 4 of .*no record start"),
    (lambda lines: [*lines, "7\t99999999"], "record 7 at byte 99999999 of "),
    (lambda lines: [*lines, "7\t0"], "or a second one"),
    (lambda lines: [*lines, lines[0]], "lists the key 1 twice"),
    (lambda lines: [*lines, "8 12"], "line 7: '8 12' is not key<TAB>byte"),
  ],
)
def test_an_idx_of_another_file_is_refused(written, change, words):
  path = written(images_of())
  index = path.with_suffix(".idx")
  index.write_text("\n".join(change(index.read_text().splitlines())))
  with pytest.raises(errors.DataError, match=f"train.idx.*{words}|train.idx {words}"):
    read(path)


def test_a_property_file_of_another_set_is_refused(written):
  path = written(images_of(), properties="2,112,112")
  with pytest.raises(errors.DataError, match=r"label is 2, but .*0 to 1 by the prope"):
    read(path)
  path = written(images_of(), properties="three")
  with pytest.raises(errors.DataError, match="property must be identities,height"):
    read(path)


def test_the_folder_must_hold_one_rec(tmp_path, written):
  path = written(images_of())
  with pytest.raises(errors.DataError, match=r"no \.rec file"):
    read(tmp_path)
  path.with_name("val.rec").write_bytes(path.read_bytes())
  with pytest.raises(errors.DataError, match=r"train\.rec, val\.rec; name the one"):
    read(path.parent)


def test_a_bucket_and_tasks_give_the_same_shards(
  written, build_config, bucket, tmp_path
):
  path = written(images_of())
  for file in path.parent.iterdir():
    storage.upload(str(file), f"{bucket}/faces/{file.name}")
  config = build_config(path, dataset="rec")
  build.main(config)
  whole = folders.files_of(config.output_dir)
  parts = {"dataset": "rec", "output_dir": str(tmp_path / "parts"), "num_tasks": 2}
  for task in ({"task_index": 0}, {"task_index": 1}, {"finalize": True}):
    build.main(build_config(f"{bucket}/faces", **parts, **task))
  assert folders.files_of(tmp_path / "parts") == whole
