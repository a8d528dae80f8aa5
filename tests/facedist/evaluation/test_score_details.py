"""The hardest pairs and the map against hand-worked cases; the file on a disk."""

import dataclasses
import pathlib

import numpy as np
import pytest
from sklearn import decomposition

from facedist import errors
from facedist.data import decoding
from facedist.evaluation import evaluator, score_details
from tests.facedist.evaluation.test_scoring import PAIRS

KEY = {"step": 100, "set": "lfw", "fingerprint": "a", "mirrored": True}
KEY |= {"weights": "trained"}
PAIR = score_details.HardPair(0.75, ("ada/1.jpg", "eva/1.jpg"), (b"first", b"2nd"))
DETAILS = score_details.ScoreDetails(
  key=KEY,
  threshold=0.5,
  scores=np.array([0.9, 0.75, 0.1], np.float32),
  same=np.array([True, False, False]),
  false_accepts=(PAIR,),
  false_rejects=(),
  map_points=np.zeros((2, 2), np.float32),
  map_labels=np.array([3, 3]),
)


def test_the_hardest_pairs_are_errors_only_and_ties_keep_their_order():
  scores = np.array([0.9, 0.6, 0.6, 0.5, 0.4, 0.3, 0.3, 0.1])
  same = np.array([0, 0, 0, 0, 1, 1, 1, 0], bool)
  accepts, rejects = score_details.hardest(scores, same, 0.5)
  assert (accepts.tolist(), rejects.tolist()) == ([0, 1, 2, 3], [5, 6, 4])
  accepts, rejects = score_details.hardest(scores, same, 0.5, count=2)
  assert (accepts.tolist(), rejects.tolist()) == ([0, 1], [5, 6])
  accepts, rejects = score_details.hardest(scores, same, 0.35)
  assert (accepts.tolist(), rejects.tolist()) == ([0, 1, 2, 3], [5, 6])


def test_the_map_has_the_principal_components_of_the_identities_with_most_images():
  rng = np.random.default_rng(0)
  labels = rng.permutation(np.repeat(np.arange(40), np.arange(1, 41)))
  embeddings = rng.normal(size=(len(labels), 8)) + labels[:, np.newaxis] % 7
  points, shown = score_details.map_points(embeddings, labels)
  assert sorted(set(shown)) == list(range(16, 40))
  assert set(np.unique(shown, return_counts=True)[1]) == {12}
  chosen = [np.flatnonzero(labels == each)[:12] for each in range(39, 15, -1)]
  expected = decomposition.PCA().fit_transform(embeddings[np.concatenate(chosen)])
  np.testing.assert_allclose(np.abs(points), np.abs(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 0, 1, 1], [0, 0, 1, 2]])
def test_there_is_no_map_of_fewer_than_three_identities(labels: list[int]):
  points, shown = score_details.map_points(np.eye(4), np.array(labels))
  assert (points.shape, shown.shape) == ((0, 2), (0,))


def test_details_hold_names_and_pixels_of_the_pairs():
  pairs = dataclasses.replace(PAIRS, same=~PAIRS.same)
  cosines = np.array([1.0, 0.9, 0.0, 0.1])
  result = evaluator.verification.verify(cosines, PAIRS.same, PAIRS.folds)
  details = evaluator.details_of(KEY, pairs, np.eye(4), cosines, result)
  first, second = details.false_accepts
  assert (first.score, first.names) == (1.0, ("a/1.jpg", "a/2.jpg"))
  assert second.names == ("b/1.jpg", "b/2.jpg")
  assert [pair.score for pair in details.false_rejects] == [0.0, 0.1]
  image = decoding.decode(details.false_rejects[0].jpegs[1])[..., ::-1]
  assert np.abs(image.astype(int) - [0, 20, 0]).max() < 8  # image 2 is dark green


def test_a_file_gives_back_what_was_saved(tmp_path: pathlib.Path):
  score_details.save(DETAILS, str(tmp_path))
  rows = [KEY | {"step": 99}, KEY, KEY | {"weights": "ema"}]
  ((place, path),) = score_details.find(str(tmp_path), rows).items()
  assert place == 1
  loaded = score_details.load(path)
  for field in dataclasses.fields(DETAILS):
    expected = getattr(DETAILS, field.name)
    np.testing.assert_array_equal(getattr(loaded, field.name), expected, field.name)


def test_a_set_may_have_any_name_and_stays_in_the_folder(tmp_path: pathlib.Path):
  key = KEY | {"set": "../é lfw"}
  score_details.save(dataclasses.replace(DETAILS, key=key), str(tmp_path))
  (file,) = (tmp_path / "evaluation").iterdir()
  assert file.name.startswith("step-00000100_..---lfw_")
  assert score_details.find(str(tmp_path), [key]) == {0: str(file)}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"not an archive"])
def test_a_file_that_is_none_is_named(tmp_path: pathlib.Path, content: bytes):
  path = tmp_path / "step.npz"
  path.write_bytes(content)
  with pytest.raises(errors.DataError, match=r"step.npz holds no details of a score"):
    score_details.load(str(path))
