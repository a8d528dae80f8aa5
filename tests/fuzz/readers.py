"""What a coverage-guided fuzzer feeds: each reader of files, by name.

  python -m tests.fuzz.run --reader=manifest --seconds=60

A harness takes any bytes and returns; a DataError is an answer, any other error a find.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from facedist import errors
from facedist.data import image_names
from facedist.data.shards import manifest, shard_index, tfrecord
from tfrecords_tools.overlap import centroids
from tfrecords_tools.selection import merge
from tfrecords_tools.sources import (
  image_list,
  insightface_bin,
  lfw,
  mnist,
  mxnet_rec,
  pair_list,
  tables,
  tar,
)
from tfrecords_tools.validation import scan

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
  name = manifest.MANIFEST_NAME
  with _folder(name, content) as folder, contextlib.suppress(errors.DataError):
    made = manifest.load(folder)
    assert len(made.fingerprint) == 8
    manifest.save(made, folder)
    assert manifest.load(folder) == made


def read_record(content: bytes) -> None:
  """Reads a framed record, and the same bytes as a payload whose CRC is right."""
  for framed in (content, tfrecord.frame(content)):
    with contextlib.suppress(errors.DataError):
      record = tfrecord.parse(tfrecord.unframe(framed))
      assert len(record.jpeg) <= len(content)


def walk_shard(content: bytes) -> None:
  """Finds the records of a shard without its index."""
  with _file(content) as path:
    rows = scan.walk_part(path, size=len(content))
    assert (rows["offset"] + rows["length"] <= len(content)).all()
    parts = scan.cut_parts(path, rows, size=len(content))
    assert b"".join(part.read() for part in parts) == content


def index_shard(content: bytes) -> None:
  """Reads a shard as `index` does, without index or manifest, and writes its index."""
  with _file(content) as path:
    walked = scan.walk_shard(path)
    assert walked.size == len(content)
    assert bool(walked.problems) or walked.rows["length"].sum() == len(content)
    assert len(walked.problems) + len(walked.rows) <= len(content)
    shard_index.check_fits(walked.rows, path="index", shard_bytes=len(content))
    written = shard_index.to_bytes(walked.rows)
    assert (shard_index.from_bytes(written, "index") == walked.rows).all()


def read_table(content: bytes) -> None:
  """Reads landmarks and face boxes, sorted; people's names, renamings and a list."""
  with _file(content) as path:
    for columns in (tables.LANDMARK_COLUMNS, tables.BOX_COLUMNS):
      with contextlib.suppress(errors.DataError):
        table = tables.SortedTable(path, columns)
        for identity in ("a", "n1", "n1/0001_01"):
          row_of, values = table.of(identity)
          assert all(name.startswith(f"{identity}/") for name in row_of)
          assert values.shape == (len(row_of), columns)
          assert np.isfinite(values).all()
    for read in (
      tables.read_identity_names,
      tables.read_renamings,
      tables.read_lines,
    ):
      with contextlib.suppress(errors.DataError):
        read(path)


def read_list(content: bytes) -> None:
  """Reads a list of images and one of paths; no line leads out of its folder."""
  with _folder("list.txt", content) as folder:
    os.mkdir(os.path.join(folder, "n1"))
    path = os.path.join(folder, "list.txt")
    names = image_names.NameFilter()
    for input_dir in (folder, None):
      origins: list[str] = []
      with contextlib.suppress(errors.DataError):
        groups = image_list.from_input_list(
          path, input_dir, names=names, origins=origins, max_checked=0
        )
        for group in groups:
          for image in group.paths:
            assert image.split("/")[0] == group.identity
      assert not any(".." in origin.split("/") for origin in origins)
    with contextlib.suppress(errors.DataError):
      groups = image_list.from_image_list(folder, path, names=names)
      assert [group.identity for group in groups] == ["n1"]


def read_embeddings(content: bytes) -> None:
  """Reads what `facedist.embed` writes: each identity's mean direction."""
  with _file(content) as path, contextlib.suppress(errors.DataError):
    found = centroids.read_centroids(path, with_halves=True)
    size = found.facts["embedding_size"]
    assert len(found.names) == len(found.counts) == len(set(found.names))
    for block in found.blocks:
      assert block.shape[1] == size
      lengths = np.linalg.norm(block.astype(np.float64), axis=1)
      assert ((np.abs(lengths - 1) < 1e-3) | (lengths == 0)).all()
    assert found.halves is not None
    assert len(found.halves) == sum(count > 1 for count in found.counts)


def open_selection(content: bytes) -> None:
  """Opens a selection's manifest to select from it again, but for its indexes."""
  refused = contextlib.suppress(errors.DataError, errors.UsageError)
  with _folder(manifest.MANIFEST_NAME, content) as folder, refused:
    made = merge.open_inputs(
      [folder], prefixes=["p"], same_names="separate", renamed={"p/a": "c"}
    )
    parts = merge.parts_of(made)
    origins = merge.origins_of(parts, folder)
    assert all(isinstance(one["prefix"], str) for one in origins.values())


def read_pairs(content: bytes) -> None:
  """Reads a list of pairs; no name in it leads out of the folder."""
  with _file(content) as path, contextlib.suppress(errors.DataError):
    for pair in lfw.read_pairs(path):
      for image in (pair.first, pair.second):
        folder, _, file = image.partition("/")
        assert "/" not in file
        assert {folder, file}.isdisjoint({"", ".", ".."})


def read_csv_pairs(content: bytes) -> None:
  """Reads a CSV of pairs; no path in it leads out of the folder."""
  with _file(content) as path, contextlib.suppress(errors.DataError):
    for pair in pair_list.read(path):
      for image in (pair.first, pair.second):
        assert {"", ".", ".."}.isdisjoint(image.split("/"))
      assert pair.first != pair.second


def read_archive(content: bytes) -> None:
  """Lists a tar file's images, as it is and with its checksums corrected.

  A fuzzer does not guess sums; behind them lie the names that lead out of a folder.
  """
  for archive in (content, _with_sums(content)):
    with _file(archive) as path, contextlib.suppress(errors.DataError):
      for member in tar.members(path, image_names.NameFilter()):
        assert 0 <= member.start <= member.start + member.length <= len(archive)
        parts = member.path.split("/")
        assert not {"", ".", ".."} & set(parts)
        assert "\0" not in member.path


def read_bin_set(content: bytes) -> None:
  """Reads a verification set's pickle."""
  with contextlib.suppress(errors.DataError):
    images, same = insightface_bin.parse(content, origin="x.bin")
    assert len(images) == 2 * len(same)
    assert all(isinstance(image, bytes) for image in images)
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
def _folder(name: str, content: bytes) -> Iterator[str]:
  """Yields a folder with a file of that content."""
  with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, name).write_bytes(content)
    yield folder


@contextlib.contextmanager
def _file(content: bytes, *, suffix: str = "") -> Iterator[str]:
  """Yields a file of that content."""
  with tempfile.NamedTemporaryFile(suffix=suffix) as stream:
    stream.write(content)
    stream.flush()
    yield stream.name


def read_npz(content: bytes) -> None:
  """Reads digits; each image is of one class."""
  with _file(content) as path, contextlib.suppress(errors.DataError):
    found = mnist.read_npz(path)
    assert found.contents is not None
    places = [int(row["start"]) for group in found.groups for row in group.rows]
    assert sorted(places) == list(range(len(found.contents)))


def read_rec(content: bytes) -> None:
  """Reads a training set; each image is found again in the bytes at its place."""
  with _file(content, suffix=".rec") as path, contextlib.suppress(errors.DataError):
    for group in mxnet_rec.read(path, image_size=112).groups:
      for row in group.rows:
        start, length = int(row["start"]), int(row["length"])
        assert start + length <= len(content)
        assert 0 < len(mxnet_rec.image_of(content[start : start + length])) < length


READERS: dict[str, Harness] = {
  "embeddings": read_embeddings,
  "index": read_index,
  "manifest": read_manifest,
  "record": read_record,
  "selection": open_selection,
  "shard": walk_shard,
  "shard_alone": index_shard,
  "table": read_table,
  "list": read_list,
  "pairs": read_pairs,
  "csv_pairs": read_csv_pairs,
  "archive": read_archive,
  "bin": read_bin_set,
  "npz": read_npz,
  "rec": read_rec,
}
