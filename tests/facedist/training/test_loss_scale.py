import json
import logging
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from facedist.training import loss_scale, metric_writer, metrics


def advance(scale: float, good_steps: int, is_finite: bool) -> tuple[float, int]:
  scale, steps = loss_scale.next_scale(
    tf.constant(scale), tf.constant(good_steps, tf.int64), tf.constant(is_finite)
  )
  return float(scale), int(steps)


@pytest.mark.parametrize(
  ("before", "is_finite", "after"),
  [
    ((1024.0, 5), True, (1024.0, 6)),
    ((1024.0, 1999), True, (2048.0, 0)),
    ((1024.0, 1999), False, (512.0, 0)),
    ((1.0, 7), False, (1.0, 0)),
  ],
)
def test_the_scale_doubles_after_2000_good_steps_and_halves_on_overflow(
  before: tuple[float, int], is_finite: bool, after: tuple[float, int]
):
  assert advance(*before, is_finite) == after


def test_a_log_has_the_history_of_the_scale_across_intervals(
  tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  caplog.set_level(logging.INFO, logger="absl")
  log = metric_writer.MetricWriter(str(tmp_path), total_steps=4, is_chief=True)
  for step, scales in ((2, [16, 8, 8]), (4, [8, 8, 16])):  # the last step changes it
    rows = np.ones((2, len(metrics.COLUMNS)), np.float32)
    rows[:, metrics.COLUMNS.index("loss_scale")] = scales[:2]
    rows[:, metrics.COLUMNS.index("next_loss_scale")] = scales[1:]
    log.interval(step=step, phase="full", rows=rows, seconds=1.0)
  log.close()
  lines = (tmp_path / metric_writer.LOG_NAME).read_text().splitlines()
  history = [json.loads(line) for line in lines if '"kind": "loss_scale"' in line]
  changes = [(each["step"], each["was"], each["loss_scale"]) for each in history]
  assert changes == [(1, 16.0, 8.0), (4, 8.0, 16.0)]
  assert caplog.text.count("step 1: loss scale 16 -> 8: the gradient overflowed") == 1
  assert "step 4: loss scale 8 -> 16: 2000 steps in a row were finite" in caplog.text
  events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "train"))
  events.Reload()
  points = {
    event.step: float(tensor_util.make_ndarray(event.tensor_proto))
    for event in events.Tensors("loss_scale")
  }
  assert points == {1: 8.0, 2: 8.0, 4: 16.0}
