"""Writes the metrics of a run: a log line, a JSON line and TensorBoard scalars."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from facedist import errors, progress, storage
from facedist.training import loss_scale, metrics

LOG_NAME = "train_metrics.jsonl"
_NOT_WRITTEN = (OSError, errors.FacedistError, tf.errors.OpError)


class MetricWriter:
  """Writes the metrics of intervals and validation passes, on the chief only.

  `workdir/train_metrics.jsonl` gets one line an interval, with the loss of every step,
  and one line of the kind loss_scale for each change of float16's loss scale.
  `workdir/tensorboard/train` and `/validation` get the scalars. A resumed run may
  write some steps again: the last line of a step counts. A write that fails does not
  stop training: JSON lines are kept and written later, scalars are lost.
  """

  def __init__(self, workdir: str, *, total_steps: int, is_chief: bool) -> None:
    self._is_chief = is_chief
    self._total_steps = total_steps
    self._path = storage.join(workdir, LOG_NAME)
    self._folder = storage.join(workdir, "tensorboard")
    self._writers: dict[str, Any] = {}
    self._waiting: list[bytes] = []
    self._is_line_complete = self._is_failing = self._has_lost_scalars = False

  @property
  def is_incomplete(self) -> bool:
    """Whether anything could not be written."""
    return bool(self._waiting) or self._has_lost_scalars

  def interval(
    self, *, step: int, phase: str, rows: np.ndarray, seconds: float
  ) -> None:
    """Reports the steps since the last report.

    Args:
      step: Finished steps, including these.
      phase: Name of the phase they belong to.
      rows: float32[steps, len(metrics.COLUMNS)].
      seconds: How long they took.
    """
    if not self._is_chief:
      return
    columns = dict(zip(metrics.COLUMNS, rows.T, strict=True))
    self._loss_scales(columns, first_step=step - len(rows))
    summary = metrics.summarise(rows[:, : len(metrics.SUMS)].sum(axis=0))
    means = summary.scalars()
    scalars = {
      **means,
      "gradient_norm": float(columns["gradient_norm"][-1]),
      "learning_rate": float(columns["learning_rate"][-1]),
      "loss_scale": float(columns["next_loss_scale"][-1]),
      "images_per_second": summary.samples / seconds,
      "damaged": summary.damaged,
    }
    if np.isfinite(columns["input_wait"]).all():
      scalars["input_wait"] = float(columns["input_wait"].sum()) / seconds
    left = (self._total_steps - step) * seconds / len(rows)
    logging.info("%s", self._line(step, f"{phase}: {_means(means)}", scalars, left))
    losses = columns["loss"] / columns["weight"]
    self._record("train", step, scalars, phase=phase, losses=losses.tolist())

  def validation(self, *, step: int, summary: metrics.Summary) -> None:
    """Reports a validation pass after `step` finished steps."""
    if not self._is_chief:
      return
    logging.info(
      "step %d validation: %s over %d images%s",
      step,
      _means(summary.scalars()),
      summary.samples,
      f", {summary.damaged} damaged left out" if summary.damaged else "",
    )
    self._record(
      "validation",
      step,
      summary.scalars(),
      samples=summary.samples,
      damaged=summary.damaged,
    )

  def close(self) -> None:
    """Writes the lines that wait, and closes TensorBoard's writers."""
    if self._waiting:
      self._try(self._write_lines)
    for writer in self._writers.values():
      if not self._try(writer.close):
        self._has_lost_scalars = True

  def _loss_scales(self, columns: Mapping[str, np.ndarray], *, first_step: int) -> None:
    """Reports each change of the loss scale at its step."""
    before, after = columns["loss_scale"], columns["next_loss_scale"]
    for change in loss_scale.changes(before, after, first_step=first_step):
      logging.info("%s", change)
      scalars = {"loss_scale": change.after}
      self._record("loss_scale", change.step, scalars, board="train", was=change.before)

  def _line(
    self, step: int, measured: str, scalars: Mapping[str, float], seconds_left: float
  ) -> str:
    damaged = f"{scalars['damaged']} damaged replaced, " if scalars["damaged"] else ""
    wait = f"{scalars['input_wait']:.1%}" if "input_wait" in scalars else "unknown"
    return (
      f"step {step}/{self._total_steps} {measured}, "
      f"gradient {scalars['gradient_norm']:.2f}, "
      f"rate {scalars['learning_rate']:.3g}, "
      f"{scalars['images_per_second']:.1f} images/s, "
      f"input wait {wait}, {damaged}{progress.duration(seconds_left)} left"
    )

  def _record(
    self,
    kind: str,
    step: int,
    scalars: Mapping[str, float],
    *,
    board: str | None = None,
    **more: Any,
  ) -> None:
    """Writes a line of this kind; TensorBoard shows it under `board`, or its kind."""
    content = {"kind": kind, "step": step, "time": time.time(), **scalars, **more}
    self._waiting.append(json.dumps(content).encode() + b"\n")
    is_good = self._try(self._write_lines)
    if is_good:
      is_good = self._try(lambda: self._show(board or kind, step, scalars))
    else:  # each attempt would leave an empty file
      self._has_lost_scalars = True
    self._is_failing = not is_good

  def _try(self, write: Callable[[], None]) -> bool:
    """Returns whether `write` succeeded; logs the first of a series of failures."""
    try:
      write()
    except _NOT_WRITTEN as error:
      if not self._is_failing:
        logging.error(
          "the logs could not be written (%s); training continues. "
          "Make room or repair %s.",
          errors.first_line(error),
          os.path.dirname(self._path),
        )
      self._is_failing = True
      return False
    return True

  def _write_lines(self) -> None:
    """Appends all the lines that wait, or none of them."""
    os.makedirs(os.path.dirname(self._path), exist_ok=True)
    if not self._is_line_complete:
      _cut_off_unfinished_line(self._path)
      self._is_line_complete = True
    with open(self._path, "ab") as stream:
      end = stream.tell()
    try:
      with open(self._path, "ab") as stream:
        stream.writelines(self._waiting)
    except OSError:
      with contextlib.suppress(OSError):
        os.truncate(self._path, end)
      raise
    self._waiting.clear()

  def _show(self, board: str, step: int, scalars: Mapping[str, float]) -> None:
    """Writes scalars for TensorBoard under `board`; to a new file after a failure."""
    try:
      if board not in self._writers:
        self._writers[board] = tf.summary.create_file_writer(
          storage.join(self._folder, board)
        )
      with self._writers[board].as_default(step):
        for name, value in scalars.items():
          tf.summary.scalar(name, value)
      self._writers[board].flush()
    except _NOT_WRITTEN:
      self._has_lost_scalars = True
      self._writers.pop(board, None)
      raise


def _cut_off_unfinished_line(path: str) -> None:
  """Truncates a file after its last whole line; a killed process leaves half a line."""
  if not os.path.exists(path):
    return
  content = storage.read_bytes(path)
  end = len(whole_lines(content))
  if end < len(content):
    logging.warning("%s: cut off its unfinished last line.", path)
    os.truncate(path, end)


def whole_lines(content: bytes) -> bytes:
  """Returns a file's content without an unfinished last line."""
  return content[: content.rfind(b"\n") + 1]


def _means(scalars: Mapping[str, float]) -> str:
  """Writes a summary's scalars, such as `loss 1.234, target cosine 0.250`."""
  return ", ".join(
    f"{name.replace('_', ' ')} {value:.3f}" for name, value in scalars.items()
  )


def step_losses(workdir: str) -> Sequence[tuple[int, float]]:
  """Reads (step, loss) of every step from a run's log; a step's last entry counts."""
  losses: dict[int, float] = {}
  content = storage.read_bytes(storage.join(workdir, LOG_NAME))
  for line in whole_lines(content).splitlines():
    entry = json.loads(line)
    if entry["kind"] == "train":
      first = entry["step"] - len(entry["losses"])
      losses |= dict(enumerate(entry["losses"], start=first))
  return sorted(losses.items())


def read_log(workdir: str) -> dict[str, list[dict[str, Any]]]:
  """Reads a run's log; a step that was trained twice counts as it was the last time.

  When a killed run resumes from a checkpoint, or a run rewinds, it trains some steps
  again. What the log said of later steps than the one that it continued from is left
  out, until it is reached again.

  Returns:
    The intervals under "train" and the passes under "validation", each by rising
    `step`, with the scalars of `MetricWriter`; none where there is no log.

  Raises:
    errors.DataError: A line before the last is no JSON object.
  """
  path = storage.join(workdir, LOG_NAME)
  kinds: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
  content = storage.read_bytes(path) if storage.exists(path) else b""
  for number, line in enumerate(whole_lines(content).splitlines(), 1):
    try:
      entry = json.loads(line)
      entries, step = kinds.get(entry["kind"], []), entry["step"]
    except (ValueError, KeyError, TypeError) as error:
      raise errors.DataError(
        f"{path}, line {number} is no line of a training log; remove that line."
      ) from error
    if entry["kind"] == "train":
      first = step - len(entry["losses"])
      for earlier in kinds.values():
        while earlier and earlier[-1]["step"] > first:
          earlier.pop()
    while entries and entries[-1]["step"] >= step:
      entries.pop()
    entries.append(entry)
  return kinds
