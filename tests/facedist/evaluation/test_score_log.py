"""The scores file through crashes, restarts and two writers."""

import json
import multiprocessing
import pathlib
import threading
from collections.abc import Callable

import pytest

from facedist import errors
from facedist.evaluation import score_log


def _row(step: int, **others) -> score_log.Row:
  return {"step": step, "set": "lfw", "fingerprint": "0a", "mirrored": True} | others


def _append_steps(path: str, start: int) -> None:
  for step in range(start, start + 20):
    score_log.ScoreLog(path).append(_row(step))


def test_rows_are_read_as_they_were_written(tmp_path: pathlib.Path):
  path = str(tmp_path / "run" / "metrics.jsonl")
  assert score_log.ScoreLog(path).rows() == []
  rows = [_row(1, accuracy_mean=0.5), _row(2, accuracy_mean=0.75)]
  for row in rows:
    assert score_log.ScoreLog(path).append(row)
  assert score_log.ScoreLog(path).rows() == rows
  lines = pathlib.Path(path).read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_score_is_written_once(tmp_path: pathlib.Path):
  scores = score_log.ScoreLog(str(tmp_path / "metrics.jsonl"))
  assert scores.append(_row(1, accuracy_mean=0.5))
  assert not scores.append(_row(1, accuracy_mean=0.9))
  assert scores.rows() == [_row(1, accuracy_mean=0.5)]


@pytest.mark.parametrize(
  "other",
  [{"set": "cfp"}, {"fingerprint": "0b"}, {"mirrored": False}, {"weights": "ema"}],
)
def test_another_set_or_way_of_embedding_is_another_score(tmp_path, other):
  scores = score_log.ScoreLog(str(tmp_path / "metrics.jsonl"))
  assert scores.append(_row(1))
  assert scores.append(_row(1, **other))
  assert len(scores.rows()) == 2


def test_a_row_of_before_averages_were_scored_is_of_the_trained_weights(tmp_path):
  scores = score_log.ScoreLog(str(tmp_path / "metrics.jsonl"))
  assert scores.append(_row(1))
  assert not scores.append(_row(1, weights="trained"))


def test_a_last_line_torn_at_any_byte_is_repaired(tmp_path: pathlib.Path):
  path = tmp_path / "metrics.jsonl"
  scores = score_log.ScoreLog(str(path))
  scores.append(_row(1))
  first = path.read_bytes()
  scores.append(_row(2))
  whole = path.read_bytes()
  for length in range(len(first), len(whole)):
    path.write_bytes(whole[:length])
    assert scores.rows() == [_row(1)]
    assert path.read_bytes() == first
    path.write_bytes(whole[:length])
    assert scores.append(_row(3))
    assert scores.rows() == [_row(1), _row(3)]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(errors.DataError, match="line 2 is not a JSON object"):
    score_log.ScoreLog(str(path)).rows()
  assert path.read_text() == '{"step": 1}\n{"st\n{"step": 3}\n'


def test_two_writers_at_once_write_every_score_once(tmp_path: pathlib.Path):
  path = str(tmp_path / "metrics.jsonl")
  _write_twice(multiprocessing.get_context("spawn").Process, path)


def test_two_writers_at_once_write_every_score_of_a_bucket_once(bucket: str):
  _write_twice(threading.Thread, f"{bucket}/metrics.jsonl")


def _write_twice(writer: Callable, path: str) -> None:
  writers = [writer(target=_append_steps, args=(path, start)) for start in (0, 10)]
  for each in writers:
    each.start()
  for each in writers:
    each.join()
  steps = [row["step"] for row in score_log.ScoreLog(path).rows()]
  assert sorted(steps) == list(range(30))


def test_a_score_that_is_not_a_number_is_refused(tmp_path: pathlib.Path):
  scores = score_log.ScoreLog(str(tmp_path / "metrics.jsonl"))
  with pytest.raises(ValueError, match="not JSON compliant"):
    scores.append(_row(1, accuracy_mean=float("nan")))
