"""What a coverage-guided fuzzer feeds: each reader of files, by name.

  python -m tests.fuzz.run --reader=manifest --seconds=60

A harness takes any bytes and returns; a DataError is an answer, any other error a find.
"""

import contextlib
import io
import json
import pathlib
import pickle
import tarfile
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from facedist import errors
from facedist.data import manifest, records, shard_index
from tfrecords_tools import bin_sets, digits, lfw, shard_parts, tables, tar_index

Harness = Callable[[bytes], None]


def read_index(content: bytes) -> None:
  """Reads an index, and checks that its rows lie in a shard of 4 kB."""
  with contextlib.suppress(errors.DataError):
    rows = shard_index.from_bytes(content, "index")
    shard_index.check_fits(rows, path="index", shard_bytes=4096, identities=3)
    for row in rows[:3]:
      assert int(row["offset"]) + int(row["length"]) <= 4096


def read_manifest(content: bytes) -> None:
  """Reads a manifest; what is accepted comes back as it was."""
  with tempfile.TemporaryDirectory() as folder:
    (pathlib.Path(folder) / manifest.MANIFEST_NAME).write_bytes(content)
    with contextlib.suppress(errors.DataError):
      made = manifest.load(folder)
      assert len(made.fingerprint) == 8
      manifest.save(made, folder)
      assert manifest.load(folder) == made


def read_record(content: bytes) -> None:
  """Reads a framed record, and the same bytes as a payload whose CRC is right."""
  for framed in (content, records.frame(content)):
    with contextlib.suppress(errors.DataError):
      record = records.parse(records.unframe(framed))
      assert len(record.jpeg) <= len(content)


def walk_shard(content: bytes) -> None:
  """Finds the records of a shard without its index."""
  with _file(content) as path:
    rows = shard_parts.walk(path, size=len(content))
    assert (rows["offset"] + rows["length"] <= len(content)).all()
    parts = shard_parts.cut(path, rows, size=len(content))
    assert b"".join(part.read() for part in parts) == content


def read_table(content: bytes) -> None:
  """Reads landmarks, face boxes, people's names and a list."""
  with _file(content) as path:
    for columns in (tables.LANDMARK_COLUMNS, tables.BOX_COLUMNS):
      with contextlib.suppress(errors.DataError):
        table = tables.read_table(path, columns)
        assert np.isfinite(table.values).all()
        assert table.values.shape == (len(table.rows), columns)
    for read in (tables.read_identity_names, tables.read_lines):
      with contextlib.suppress(errors.DataError):
        read(path)


def read_pairs(content: bytes) -> None:
  """Reads a list of pairs; no name in it leads out of the folder."""
  with _file(content) as path, contextlib.suppress(errors.DataError):
    for pair in lfw.read_pairs(path):
      assert "/" not in pair.first[0] + pair.second[0]


def read_archive(content: bytes) -> None:
  """Lists a tar file's images, as it is and with the sums of its headers mended.

  A fuzzer does not guess sums; behind them lie the names that lead out of a folder.
  """
  for archive in (content, _with_sums(content)):
    with _file(archive) as path, contextlib.suppress(errors.DataError):
      for member in tar_index.members(path):
        assert 0 <= member.start <= member.start + member.length <= len(archive)
        parts = member.path.split("/")
        assert len(parts) == 2
        assert not {"", ".", ".."} & set(parts)
        assert "\0" not in member.path


def read_bin_set(content: bytes) -> None:
  """Reads a verification set's pickle; it holds no more than the file does."""
  with contextlib.suppress(errors.DataError):
    images, same = bin_sets.parse(content, origin="x.bin")
    assert len(images) == 2 * len(same)
    distinct = {id(image): len(image) for image in images}
    assert sum(distinct.values()) <= len(content)
    assert all(isinstance(flag, bool) for flag in same)


def _with_sums(content: bytes) -> bytes:
  """Returns the archive with the right sum in every block that is not empty."""
  blocks = [content[start : start + 512] for start in range(0, len(content), 512)]
  for number, block in enumerate(blocks):
    if len(block) == 512 and block.strip(b"\0"):
      total = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
      blocks[number] = block[:148] + b"%06o\0 " % total + block[156:]
  return b"".join(blocks)


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[str]:
  """Yields a file of that content."""
  with tempfile.NamedTemporaryFile() as stream:
    stream.write(content)
    stream.flush()
    yield stream.name


def read_npz(content: bytes) -> None:
  """Reads digits; each image is of one class."""
  with _file(content) as path, contextlib.suppress(errors.DataError):
    found = digits.read_npz(path)
    assert found.contents is not None
    places = [int(row["start"]) for group in found.groups for row in group.rows]
    assert sorted(places) == list(range(len(found.contents)))


READERS: dict[str, Harness] = {
  "index": read_index,
  "manifest": read_manifest,
  "record": read_record,
  "shard": walk_shard,
  "table": read_table,
  "pairs": read_pairs,
  "archive": read_archive,
  "bin": read_bin_set,
  "npz": read_npz,
}


def seeds() -> dict[str, list[bytes]]:
  """Returns sound files of each kind, from which the fuzzer starts."""
  record = records.serialize(records.Record(b"\xff\xd8 jpeg", 1, "b", "b/1.jpg"))
  framed = records.frame(record)
  rows = np.zeros(2, shard_index.INDEX_DTYPE)
  rows["length"], rows["image_offset"], rows["image_length"] = 100, 40, 6
  rows["offset"] = [0, 100]
  shard = manifest.Shard("a.tfrecord", 2, 200, 1, "a.index.npy", 2)
  made = manifest.Manifest(
    kind="classification",
    dataset="vggface2",
    tool_version="0",
    image_size=112,
    quality=95,
    alignment={"template": "arcface"},
    source={"seed": 0},
    identities=("a", "b"),
    identity_names={"a": "A"},
    splits={"train": manifest.Split(2, (shard,))},
    skipped=({"path": "a/1.jpg", "reason": "cut off"},),
  )
  return {
    "index": [shard_index.to_bytes(rows), shard_index.to_bytes(rows[:0])],
    "manifest": [manifest.to_json(made).encode(), json.dumps({"format": 1}).encode()],
    "record": [record, framed],
    "shard": [framed * 3],
    "table": [
      b'NAME_ID,X,Y,W,H\n"n1/0001_01",57,62,82,111\n',
      b"n1/1,1,2,3,4,5,6,7,8,9,10\n",
      b'Class_ID, Name, Flag\nn1, "A,_B", 1\n',
    ],
    "archive": [
      _archive(form, name)
      for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
      for name in ("n1/1.jpg", "n1/" + "x" * 120 + ".jpg", "../n1/1.jpg")
      if form != tarfile.USTAR_FORMAT or len(name) < 100
    ],
    "bin": [
      pickle.dumps(([b"\xff\xd8" + bytes(3)] * 2 + [b"b", b"c"], same), protocol)
      for same in ([True, False], np.array([True, False]))
      for protocol in (0, 2, 5)
    ],
    "npz": [_npz(np.savez), _npz(np.savez_compressed)],
    "pairs": [b"2\t1\nA\t1\t2\nA\t1\tB\t1\nB\t1\t2\nA\t2\tB\t1\n"],
  }


def _npz(save: Callable[..., None]) -> bytes:
  """Returns three digits of 2 x 2 pixels."""
  stream = io.BytesIO()
  images, labels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2), np.array([0, 1, 0])
  parts = (images[:2], labels[:2], images[2:], labels[2:])
  save(stream, **dict(zip(digits.KEYS, parts, strict=True)))
  return stream.getvalue()


def _archive(form: int, name: str) -> bytes:
  """Returns a tar file of one image."""
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode="w", format=form, bufsize=512) as archive:
    info = tarfile.TarInfo(name)
    info.size = 4
    archive.addfile(info, io.BytesIO(b"jpeg"))
  return stream.getvalue()[: 512 * 8]
