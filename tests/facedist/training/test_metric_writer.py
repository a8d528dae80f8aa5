"""The log of a run on a disk that fills up, and after a kill within a line."""

import json
import os
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from facedist import errors
from facedist.training import metric_writer, metrics


def report(log: metric_writer.MetricWriter, *numbers: int) -> None:
  """Reports single steps, whose loss is their number."""
  for number in numbers:
    row = dict.fromkeys(metrics.COLUMNS, 1.0) | {"loss": float(number)}
    rows = np.array([[row[name] for name in metrics.COLUMNS]], np.float32)
    log.interval(step=number + 1, phase="full", rows=rows, seconds=1.0)


@pytest.fixture
def log(tmp_path: pathlib.Path) -> metric_writer.MetricWriter:
  return metric_writer.MetricWriter(str(tmp_path), total_steps=9, is_chief=True)


def test_lines_wait_until_there_is_room_and_the_failure_is_told_once(
  log: metric_writer.MetricWriter,
  tmp_path: pathlib.Path,
  caplog: pytest.LogCaptureFixture,
  limit_files: Callable[[int], None],
):
  limit_files(600)  # more than a line, less than two
  report(log, 0, 1, 2)
  assert log.is_incomplete
  content = (tmp_path / metric_writer.LOG_NAME).read_bytes()
  assert 0 < len(content) < 600
  assert content.endswith(b"\n")  # no half of a line
  limit_files(-1)
  report(log, 3)
  log.close()
  losses = metric_writer.step_losses(str(tmp_path))
  assert losses == [(number, float(number)) for number in range(4)]
  said = [one for one in caplog.messages if "the logs could not be written" in one]
  assert len(said) == 1
  assert f"Make room or repair {tmp_path}" in said[0]


def test_a_line_that_a_killed_process_left_unfinished_is_cut_off(
  log: metric_writer.MetricWriter, tmp_path: pathlib.Path
):
  report(log, 0, 1)
  with open(tmp_path / metric_writer.LOG_NAME, "ab") as stream:
    stream.write(b'{"kind": "train", "st')
  assert len(metric_writer.step_losses(str(tmp_path))) == 2
  resumed = metric_writer.MetricWriter(str(tmp_path), total_steps=9, is_chief=True)
  report(resumed, 2)
  lines = (tmp_path / metric_writer.LOG_NAME).read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
  assert not resumed.is_incomplete


def test_scalars_that_cannot_be_shown_do_not_keep_lines_from_being_written(
  log: metric_writer.MetricWriter, tmp_path: pathlib.Path
):
  (tmp_path / "tensorboard").write_text("no folder")
  report(log, 0, 1)
  assert len(metric_writer.step_losses(str(tmp_path))) == 2
  assert log.is_incomplete
  os.remove(tmp_path / "tensorboard")
  report(log, 2)
  log.close()
  assert list((tmp_path / "tensorboard/train").glob("events*"))


def test_the_log_is_read_without_what_a_resumed_run_trained_again(
  tmp_path: pathlib.Path,
):
  def entry(kind: str, step: int, mark: int) -> str:
    losses = {"losses": [0.0] * 10} if kind == "train" else {}
    return json.dumps({"kind": kind, "step": step, "mark": mark} | losses) + "\n"

  lines = [entry("train", 10, 1), entry("train", 20, 1), entry("loss_scale", 20, 1)]
  lines += [entry("validation", 20, 1), entry("train", 30, 1), entry("train", 40, 1)]
  lines += [entry("validation", 40, 1), entry("train", 30, 2)]  # resumed from step 20
  lines += [entry("validation", 30, 2), entry("validation", 30, 3)]
  half = '{"kind": "train", "st'
  (tmp_path / metric_writer.LOG_NAME).write_text("".join([*lines, half]))
  log = metric_writer.read_log(str(tmp_path))
  found = {
    kind: [(each["step"], each["mark"]) for each in entries]
    for kind, entries in log.items()
  }
  assert found == {
    "train": [(10, 1), (20, 1), (30, 2)],
    "validation": [(20, 1), (30, 3)],
  }


def test_a_broken_line_of_the_log_is_named(tmp_path: pathlib.Path):
  (tmp_path / metric_writer.LOG_NAME).write_text('{"kind": "train", "st\n{}\n')
  with pytest.raises(errors.DataError, match=r"train_metrics.jsonl, line 1 is no line"):
    metric_writer.read_log(str(tmp_path))


def test_a_run_without_a_log_has_no_entries(tmp_path: pathlib.Path):
  assert metric_writer.read_log(str(tmp_path)) == {"train": [], "validation": []}
