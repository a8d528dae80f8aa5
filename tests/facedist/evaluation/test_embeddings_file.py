"""Files of embeddings in each format: read back by other libraries and by ours."""

import json
import pathlib
import sys
import zipfile

import numpy as np
import pytest

from facedist import errors, storage
from facedist.evaluation import embeddings_file

FACTS = {"model": "a", "step": 3, "embedding_size": 2}
FIRST = 'n1/ü "1".jpg'
EXACT = (".npz", ".parquet")


@pytest.fixture(params=embeddings_file.FORMATS)
def suffix(request: pytest.FixtureRequest) -> str:
  """Each format; skips those whose library is not installed."""
  if request.param == ".parquet":
    pytest.importorskip("pyarrow")
  return request.param


def write(path: pathlib.Path | str) -> str:
  """Writes two embeddings and, between them, an image that was skipped."""
  with embeddings_file.new_file(str(path), FACTS, overwrite=False) as writer:
    writer.add(path=FIRST, identity="n1", embedding=np.array([3, -4], np.float32))
    writer.skip(path="n1/2.jpg", reason="cut off")
    writer.add(path="3.jpg", identity=None, embedding=np.array([1e-7, 0], np.float32))
  assert writer.num_skipped == 1
  return str(path)


def test_json_is_one_object_with_an_embedding_a_line(tmp_path):
  text = pathlib.Path(write(tmp_path / "a.json")).read_text()
  assert json.loads(text) == FACTS | {
    "embeddings": [
      {"path": FIRST, "identity": "n1", "embedding": [3, -4]},
      {"path": "3.jpg", "identity": None, "embedding": [1e-7, 0]},
    ],
    "skipped": [{"path": "n1/2.jpg", "reason": "cut off"}],
  }
  assert sum(line.startswith('{"path"') for line in text.splitlines()) == 2


def test_json_lines_are_the_facts_and_an_image_each(tmp_path):
  text = pathlib.Path(write(tmp_path / "a.jsonl")).read_text()
  assert [json.loads(line) for line in text.splitlines()] == [
    {"facts": FACTS},
    {"path": FIRST, "identity": "n1", "embedding": [3, -4]},
    {"path": "n1/2.jpg", "reason": "cut off"},
    {"path": "3.jpg", "identity": None, "embedding": [1e-7, 0]},
  ]


def test_npz_holds_arrays_that_numpy_reads_without_pickle(tmp_path):
  with np.load(write(tmp_path / "a.npz"), allow_pickle=False) as arrays:
    assert arrays["embeddings"].dtype == np.float32
    np.testing.assert_array_equal(
      arrays["embeddings"], np.array([[3, -4], [1e-7, 0]], np.float32)
    )
    assert arrays["paths"].tolist() == [FIRST, "3.jpg"]
    assert arrays["identities"].tolist() == ["n1", ""]
    assert arrays["skipped_paths"].tolist() == ["n1/2.jpg"]
    assert arrays["skipped_reasons"].tolist() == ["cut off"]
    assert json.loads(str(arrays["facts"])) == FACTS


def test_parquet_holds_a_row_an_image_and_the_rest_as_metadata(tmp_path):
  parquet = pytest.importorskip("pyarrow.parquet")
  path = write(tmp_path / "a.parquet")
  table = parquet.read_table(path)
  assert table.to_pylist() == [
    {"path": FIRST, "identity": "n1", "embedding": [3, -4]},
    {"path": "3.jpg", "identity": None, "embedding": [np.float32(1e-7), 0]},
  ]
  assert json.loads(parquet.read_metadata(path).metadata[b"facedist"]) == {
    "facts": FACTS,
    "skipped": [{"path": "n1/2.jpg", "reason": "cut off"}],
  }


def test_parquet_without_pyarrow_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(errors.UsageError, match=r"pip install 'facedist\[parquet\]'"):
    embeddings_file.check_format("a.parquet", flag="output")


def test_every_format_is_read_back_at_length_one(tmp_path, suffix):
  read = embeddings_file.load_embeddings(write(tmp_path / f"a{suffix}"))
  assert read.facts == FACTS
  assert (read.paths, read.identities) == ([FIRST, "3.jpg"], ["n1", ""])
  assert read.embeddings.dtype == np.float32
  np.testing.assert_allclose(read.embeddings, [[0.6, -0.8], [1, 0]], rtol=1e-6)


def test_formats_hold_more_than_a_row_group_and_change_no_float(tmp_path, suffix):
  rng = np.random.default_rng(0)
  embeddings = rng.normal(size=(5000, 4)).astype(np.float32)  # a group has 4096 rows
  embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
  path = str(tmp_path / f"a{suffix}")
  with embeddings_file.new_file(path, {}, overwrite=False) as writer:
    for number, embedding in enumerate(embeddings):
      writer.add(path=str(number), identity="n", embedding=embedding)
  read = embeddings_file.load_embeddings(path, labelled=True).embeddings
  tolerance = 1e-7 if suffix in EXACT else 1e-6
  np.testing.assert_allclose(read, embeddings, atol=tolerance)


def test_a_bucket_holds_the_same_bytes(tmp_path, bucket, suffix):
  local = pathlib.Path(write(tmp_path / f"a{suffix}"))
  there = write(f"{bucket}/a{suffix}")
  assert storage.read_bytes(there) == local.read_bytes()
  assert embeddings_file.load_embeddings(there).paths == [FIRST, "3.jpg"]


def test_an_error_or_another_process_leaves_what_is_there(tmp_path, suffix):
  path = tmp_path / f"a{suffix}"

  def fail() -> None:
    with embeddings_file.new_file(str(path), FACTS, overwrite=False) as writer:
      writer.add(path="1", identity=None, embedding=np.ones(2, np.float32))
      raise RuntimeError

  with pytest.raises(RuntimeError):
    fail()
  assert list(tmp_path.iterdir()) == []
  path.write_bytes(b"mine")
  with pytest.raises(errors.UsageError, match=r"--output=\S+ was made by another"):
    write(path)
  assert path.read_bytes() == b"mine"


def test_a_file_of_nothing_is_valid_but_not_to_be_loaded(tmp_path, suffix):
  path = str(tmp_path / f"a{suffix}")
  with embeddings_file.new_file(path, FACTS, overwrite=False) as writer:
    writer.skip(path="1.jpg", reason="no image")
  if suffix == ".json":
    assert json.loads(pathlib.Path(path).read_text())["embeddings"] == []
  if suffix == ".npz":
    with np.load(path) as arrays:
      assert arrays["embeddings"].shape == (0, 2)
      assert arrays["paths"].shape == (0,)
  with pytest.raises(errors.DataError, match="embed again"):
    embeddings_file.load_embeddings(path)


def test_a_file_that_is_cut_off_or_of_something_else_is_an_error(tmp_path, suffix):
  path = pathlib.Path(write(tmp_path / f"a{suffix}"))
  content = path.read_bytes()
  for damaged in (b"", content[: len(content) // 2], b"\x00\xff no text", b"[1]\n"):
    path.write_bytes(damaged)
    with pytest.raises(errors.DataError, match=str(path)):
      embeddings_file.load_embeddings(str(path))


@pytest.mark.parametrize(
  ("identity", "embedding"), [(None, [1, 0]), ("n", [0, 0]), ("n", [np.nan, 1])]
)
def test_an_image_of_nobody_or_without_a_direction_is_an_error(
  tmp_path, suffix, identity, embedding
):
  path = str(tmp_path / f"a{suffix}")
  with embeddings_file.new_file(path, FACTS, overwrite=False) as writer:
    writer.add(path="1", identity="n", embedding=np.ones(2, np.float32))
    writer.add(path="2", identity=identity, embedding=np.array(embedding, np.float32))
  with pytest.raises(errors.DataError, match=r"(line|image) \w+.*; embed again"):
    embeddings_file.load_embeddings(path, labelled=True)


def test_an_npz_with_a_changed_byte_or_pickles_or_nothing_is_an_error(tmp_path):
  path = pathlib.Path(write(tmp_path / "a.npz"))
  content = bytearray(path.read_bytes())
  content[content.index(np.array([3, -4], "<f4").tobytes())] ^= 1
  path.write_bytes(content)
  np.savez(tmp_path / "pickles.npz", embeddings=np.array([{}], object))
  zipfile.ZipFile(tmp_path / "nothing.npz", "w").close()
  for name in ("a", "pickles", "nothing"):
    with pytest.raises(errors.DataError, match=rf"{name}\.npz, .*embed again"):
      embeddings_file.load_embeddings(str(tmp_path / f"{name}.npz"))


def test_json_with_embeddings_of_several_sizes_is_an_error(tmp_path):
  path = pathlib.Path(write(tmp_path / "a.json"))
  path.write_text(path.read_text().replace("[3, -4]", "[3, -4, 1]"))
  with pytest.raises(errors.DataError, match="embed again"):
    embeddings_file.load_embeddings(str(path))


def test_json_under_another_name_is_still_read(tmp_path):
  (tmp_path / "old").write_bytes(pathlib.Path(write(tmp_path / "a.json")).read_bytes())
  assert embeddings_file.load_embeddings(str(tmp_path / "old")).paths[0] == FIRST
