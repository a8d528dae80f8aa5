"""The embeddings document, read back with a JSON parser."""

import io
import json

import numpy as np
import pytest

from facedist.evaluation import embeddings_json


def test_the_document_says_facts_embeddings_and_what_was_skipped():
  stream = io.StringIO()
  with embeddings_json.EmbeddingsJson(stream, {"model": "a", "step": 3}) as document:
    document.add(
      path='n1/ü "1".jpg', identity="n1", embedding=np.array([1, -0.5], np.float32)
    )
    document.skip(path="n1/2.jpg", reason="cut off")
    document.add(
      path="3.jpg", identity=None, embedding=np.array([1e-7, 0.125], np.float32)
    )
  assert document.num_skipped == 1
  assert json.loads(stream.getvalue()) == {
    "model": "a",
    "step": 3,
    "embeddings": [
      {"path": 'n1/ü "1".jpg', "identity": "n1", "embedding": [1, -0.5]},
      {"path": "3.jpg", "identity": None, "embedding": [1e-7, 0.125]},
    ],
    "skipped": [{"path": "n1/2.jpg", "reason": "cut off"}],
  }


def test_a_document_of_nothing_is_valid():
  stream = io.StringIO()
  with embeddings_json.EmbeddingsJson(stream, {}):
    pass
  assert json.loads(stream.getvalue()) == {"embeddings": [], "skipped": []}


def test_six_digits_move_no_cosine_by_a_millionth():
  rng = np.random.default_rng(0)
  embeddings = rng.normal(size=(20, 512)).astype(np.float32)
  embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
  stream = io.StringIO()
  with embeddings_json.EmbeddingsJson(stream, {}) as document:
    for number, embedding in enumerate(embeddings):
      document.add(path=str(number), identity=None, embedding=embedding)
  entries = json.loads(stream.getvalue())["embeddings"]
  read = np.array([entry["embedding"] for entry in entries])
  np.testing.assert_allclose(read @ read.T, embeddings @ embeddings.T, atol=1e-6)


def test_each_embedding_is_written_at_once_on_a_line_of_its_own():
  stream = io.StringIO()
  document = embeddings_json.EmbeddingsJson(stream, {"step": 1})
  sizes = []
  for number in range(3):
    document.add(path=str(number), identity=None, embedding=np.ones(4, np.float32))
    sizes.append(len(stream.getvalue()))
  assert sizes[1] - sizes[0] == sizes[2] - sizes[1] > 0
  lines = stream.getvalue().splitlines()
  assert [line.startswith('{"path"') for line in lines[-3:]] == [True] * 3


def test_an_error_leaves_the_document_open():
  stream = io.StringIO()

  def fail() -> None:
    with embeddings_json.EmbeddingsJson(stream, {}):
      raise RuntimeError

  with pytest.raises(RuntimeError):
    fail()
  assert "skipped" not in stream.getvalue()
