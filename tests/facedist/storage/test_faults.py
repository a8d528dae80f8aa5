"""facedist.storage while requests fail: the same results, or one line in time."""

import pathlib
import random

import pytest

from facedist import storage
from facedist.storage import buckets as bucket_paths
from facedist.storage import uploads
from tests import buckets

CONTENT = random.Random(0).randbytes(1_500_000)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
  """Makes CONTENT a large file: 6 pieces of a transfer each way."""
  monkeypatch.setattr(bucket_paths, "_PIECE_BYTES", 256 << 10)
  monkeypatch.setattr(uploads, "_PIECE_BYTES", 256 << 10)


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr("facedist.storage.retrying._FIRST_PAUSE_SECONDS", 0.01)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("small_pieces")
def test_every_operation_gives_the_same_through_faults(
  bucket: buckets.Bucket, tmp_path: pathlib.Path, seed: int
):
  bucket.most_per_page = 4
  bucket.faults.rate(0.3, seed=seed)
  local, copy = tmp_path / "local", tmp_path / "copy"
  local.write_bytes(CONTENT)
  for number in range(10):
    assert storage.write_bytes(f"{bucket}/small/{number}", b"%d" % number)
    assert storage.write_bytes(f"{bucket}/once/{number}", b"1", if_absent=True)
    assert not storage.write_bytes(f"{bucket}/once/{number}", b"2", if_absent=True)
  assert storage.upload(str(local), f"{bucket}/large")
  assert not storage.upload(str(local), f"{bucket}/large", if_absent=True)
  storage.download(f"{bucket}/large", str(copy))
  assert copy.read_bytes() == CONTENT
  assert storage.read_bytes(f"{bucket}/large") == CONTENT
  assert storage.size(f"{bucket}/large") == len(CONTENT)
  generation = storage.generation(f"{bucket}/large")
  assert generation == storage.generation(f"{bucket}/large")
  for start in range(0, 1_000_000, 200_000):
    piece = CONTENT[start : start + 150_000]
    assert storage.read_range(f"{bucket}/large", start, 150_000) == piece
    pinned = storage.read_range(
      f"{bucket}/large", start, 150_000, generation=generation
    )
    assert pinned == piece
  for number in range(0, 10, 2):
    storage.remove(f"{bucket}/small/{number}")
  assert storage.list_names(f"{bucket}/small") == ["1", "3", "5", "7", "9"]
  names = [f"once/{number}" for number in range(10)]
  names += [f"small/{number}" for number in range(1, 10, 2)]
  assert [path for path, _ in storage.walk(str(bucket))] == ["large", *names]
  assert storage.read_bytes(f"{bucket}/small/3") == b"3"
  assert storage.exists(f"{bucket}/small/3")
  assert not storage.exists(f"{bucket}/small/2")
  assert len(bucket.traffic.faults()) == len(buckets.KINDS)
