"""The input benchmark on a few images: it runs, and its sides do what they say."""

from unittest import mock

import numpy as np
import pytest
import simplejpeg

from benchmarks import input_pipeline
from facedist import errors
from facedist.data.readers import local_reader

TINY = input_pipeline.BenchmarkConfig(batch=8, batches=2, rounds=1, images=128)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> str:
  monkeypatch.delenv("FACEDIST_REAL_DATA", raising=False)
  input_pipeline._write_shards(str(tmp_path), TINY)
  return str(tmp_path)


def test_it_measures_four_sides_and_gives_the_two_ratios(monkeypatch, caplog):
  monkeypatch.delenv("FACEDIST_REAL_DATA", raising=False)
  caplog.set_level("INFO", logger="absl")
  results = input_pipeline.run(TINY)
  assert "(random patterns, as $FACEDIST_REAL_DATA is not set)" in caplog.text
  best = max(results[f"TFRecordDataset, {kind} DCT"] for kind in ("accurate", "fast"))
  ours, alone = results["facedist"], results["libjpeg-turbo alone"]
  assert min(best, ours, alone) > 0
  assert results["facedist / libjpeg-turbo alone"] == pytest.approx(ours / alone)
  assert results["facedist / TFRecordDataset"] == pytest.approx(ours / best)
  assert len(results) == 6


def test_images_of_a_folder_are_taken_as_they_are(tmp_path):
  written = []
  for shade, name in enumerate(("n1/a.jpg", "n2/b.jpg", "n2/c.jpg")):
    pixels = np.full((112, 112, 3), 50 * shade, np.uint8)
    path = tmp_path / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    written.append(simplejpeg.encode_jpeg(pixels))
    path.write_bytes(written[-1])
  (tmp_path / "shards").mkdir()
  settings = input_pipeline.BenchmarkConfig(data_dir=str(tmp_path / "images"))
  origin = input_pipeline._write_shards(str(tmp_path / "shards"), settings)
  assert origin == str(tmp_path / "images")
  jpegs, _ = local_reader.open_reader(str(tmp_path / "shards"), "train").read(
    np.arange(3)
  )
  assert jpegs == written


def test_a_folder_without_images_is_a_data_error(tmp_path):
  settings = input_pipeline.BenchmarkConfig(data_dir=str(tmp_path / "none"))
  with pytest.raises(errors.DataError, match=r"holds no \.jpg files"):
    input_pipeline._write_shards(str(tmp_path), settings)


def test_both_data_sets_yield_whole_batches_of_the_same_images(folder):
  shards = local_reader.open_reader(folder, "train")
  everything, _ = shards.read_batch(np.arange(shards.num_records))
  known = {image.tobytes() for image in everything}
  ours = next(iter(input_pipeline._facedist(shards, 8)))["image"].numpy()
  theirs, _ = next(iter(input_pipeline._tfrecord(folder, 8, "INTEGER_ACCURATE")))
  assert ours.shape == theirs.shape == (8, 112, 112, 3)
  for image in (*ours, *theirs.numpy()):
    assert image.tobytes() in known


def test_bare_decoding_decodes_as_many_images_as_asked(folder, monkeypatch):
  jpegs, _ = local_reader.open_reader(folder, "train").read(np.arange(5))
  decode = mock.Mock(wraps=simplejpeg.decode_jpeg)
  monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
  input_pipeline._decode(jpegs, 12)
  decoded = [call.args[0] for call in decode.call_args_list]
  assert sorted(decoded) == sorted((jpegs * 3)[:12])
