"""Files that stand for others: every reader calls them what they are, in one line."""

import pathlib
from collections.abc import Callable

import pytest

from facedist import config, errors, storage
from facedist.data import decoding, image_names, noise, verification_set
from facedist.data.shards import manifest, shard_index
from facedist.training.config import TrainConfig
from tfrecords_tools import rebuild_index, verify
from tfrecords_tools.sources import insightface_bin, mnist, tables, tar

POINTER = (
  b"version https://git-lfs.github.com/spec/v1\n"
  b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
  b"size 12345\n"
)
FILES: dict[str, Callable[[str], object]] = {
  "manifest.json": lambda path: manifest.load(str(pathlib.Path(path).parent)),
  "train-00000-of-00001.index.npy": shard_index.load,
  "train-00000-of-00001.tfrecord": lambda path: rebuild_index.main(
    rebuild_index.IndexConfig(data_dir=str(pathlib.Path(path).parent), num_processes=1)
  ),
  "lfw.bin": insightface_bin.read,
  "mnist.npz": mnist.read_npz,
  "faces.tar": lambda path: list(tar.members(path, image_names.NameFilter())),
  "landmarks.csv": lambda path: list(tables.numbers_of(path, 10)),
  "names.csv": tables.read_identity_names,
  "1.jpg": lambda path: decoding.decode(pathlib.Path(path).read_bytes()),
  "a record's image": lambda path: decoding.jpeg_size(pathlib.Path(path).read_bytes()),
  "config.json": lambda path: config.from_json(
    TrainConfig, pathlib.Path(path).read_text(), path
  ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_git_lfs_pointer_is_called_that(
  name: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
  path = tmp_path / name
  path.write_bytes(POINTER)
  with pytest.raises(errors.FacedistError) as caught:
    FILES[name](str(path))
  told = [str(caught.value), *(each.getMessage() for each in caplog.records)]
  assert any("is a Git LFS pointer, not the file itself" in line for line in told), told


def test_pairs_that_are_a_git_lfs_pointer_are_called_that(tmp_path: pathlib.Path):
  folder = str(tmp_path)
  noise.write_noise_verification_set(
    folder, num_pairs=4, folds=2, image_size=16, seed=0
  )
  (tmp_path / "pairs.npy").write_bytes(POINTER)
  with pytest.raises(errors.DataError, match=r"pairs\.npy is a Git LFS pointer"):
    verification_set.load_verification_set(folder)
  (problem,) = verify.verify(folder, verify.Totals(), num_processes=1)
  assert "pairs.npy is a Git LFS pointer" in str(problem)


@pytest.mark.parametrize(
  ("start", "kind"),
  [
    (POINTER, "a Git LFS pointer"),
    (b"\x1f\x8b\x08\0", "compressed with GZIP"),
    (b"x\x9c\x01", "compressed with ZLIB"),
    (b"\n<!DOCTYPE HTML><html>", "a web page"),
    (b"xz", None),
    (b"", None),
  ],
)
def test_a_file_s_kind_is_told_by_its_first_bytes(start: bytes, kind: str | None):
  found = storage.kind_of(start)
  assert found is None if kind is None else (found or "").startswith(kind)


def test_a_text_that_begins_like_compressed_bytes_is_read(tmp_path: pathlib.Path):
  (tmp_path / "list.txt").write_text("x^2/1.jpg\n")
  assert list(storage.open_lines(str(tmp_path / "list.txt"))) == ["x^2/1.jpg"]
