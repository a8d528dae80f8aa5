"""Scores the checkpoints of a training run on verification sets, during or after it.

Start it before, during or after training, on a machine that sees the workdir:

  python -m facedist.evaluate --workdir=/runs/a \\
    --verification_data=lfw=/data/lfw_112,cfp_fp=gs://bucket/cfp_112

A set without a name before its folder is called as its manifest's data set. A folder
whose own name holds = is written with a slash, as in ./a=b.

It scores every checkpoint once, by increasing step, and holds a lease on those that
have no score yet, so that training does not delete them. Each score is a line of the
log and of /runs/a/metrics.jsonl, and a point and pictures in TensorBoard (tensorboard
--logdir=/runs/a/tensorboard): the accuracy over the folds, AUC, EER, and TAR at FAR
1e-1, 1e-2, ... down to what the number of different pairs supports, with 95 % intervals
of a bootstrap over identities (over pairs, where a set names no identities). With
several sets, the log, the table and TensorBoard also have the mean over the sets. When
training is done, it prints a table and ends. If it is killed and started again, it
continues where it was. Several may run at once, on one or many machines: they divide
the checkpoints. It never joins the training cluster: TF_CONFIG is ignored.

  --once              scores the checkpoints that have no score yet, then ends
  --keep_best=accuracy  keeps the best checkpoint so far, beyond those that training
                      keeps; --checkpoint=best is its name for embed and export
  --policy=latest     scores the newest checkpoint where several wait, and records the
                      others in /runs/a/unscored.jsonl as skipped
  --noreport          leaves out /runs/a/report.html, the page of facedist.report that
                      is drawn again after each checkpoint, beside the scoring
  --groups=race.csv   adds accuracy and TAR by group, each group's pairs at the same
                      thresholds, and the largest gaps
  --checkpoint=1200   prints the score of one checkpoint and writes nothing

To learn why two scores differ, name two files with a score each: two metrics.jsonl, of
which the last row of each set counts, or what --checkpoint has printed.

  python -m facedist.evaluate --explain A.json B.json

It tells what differs in their pairs, pixels, weights, alignment, precision, versions
and so on, the most important first, and what does not. It takes no other flag.
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import numpy as np
import tensorflow as tf
from absl import logging

from facedist import __version__, config, errors, storage
from facedist.config import setting
from facedist.data.verification_set import VerificationSet, load_verification_sets
from facedist.distributed import strategies
from facedist.evaluation import (
  best_checkpoint,
  evaluator,
  explain,
  groups,
  report,
  score_details,
)
from facedist.evaluation.best_checkpoint import BestCheckpoint
from facedist.evaluation.evaluator import Embedded, Scorer, ScoreSettings
from facedist.evaluation.report_page import ReportWriter
from facedist.evaluation.score_log import (
  SCORE_LOG_NAME,
  UNSCORED_LOG_NAME,
  ScoreLog,
  read_rows,
)
from facedist.training.checkpoint import checkpoints
from facedist.training.checkpoint.uploader import file_uploader
from facedist.training.config import InputSettings
from facedist.training.inference import STRICT_ALIGNMENT_HELP, WEIGHTS, WEIGHTS_HELP


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """Which run is scored on which sets, and how long to wait for its checkpoints."""

  workdir: str = setting(help="Folder of the training run.", path=True)
  verification_data: str = setting(
    help="Folder of a verification set, or NAME=FOLDER; or several, separated by "
    "commas.",
    paths=True,
  )
  cache_dir: str = setting(
    InputSettings.cache_dir,
    help="Folder on a local disk for sets of a bucket.",
    on_disk=True,
  )
  cache_gb: float = setting(
    0.0,
    help="Largest size of --cache_dir, in GB (1e9 bytes); the sets must fit. 0: no "
    "limit.",
    at_least=0.0,
  )
  groups: str | None = setting(
    None,
    help="CSV file with a line image,group for each image of the sets that is in a "
    "group, such as RFW's: adds by_group to the scores made from now on. Images are "
    "called as facedist.embed calls them.",
    path=True,
  )
  once: bool = setting(False, help="Score the checkpoints that exist, then end.")
  policy: str = setting(
    "all",
    help="Which checkpoints to score where they come faster than they can be scored: "
    "all, by increasing step, or latest: the newest, and the older ones are skipped.",
    choices=evaluator.POLICIES,
  )
  keep_best: str = setting(
    "none",
    help="Keep the best checkpoint by this metric, of several sets by their mean, "
    "beyond the --keep_last of training, and name it in best.json.",
    choices=("none", *best_checkpoint.METRICS),
  )
  checkpoint: str | None = setting(
    None,
    help="Print the score of this step or path, or of best, only; write nothing.",
    path=True,
  )
  report: bool = setting(
    True, help="Whether to draw report.html in the workdir after each checkpoint."
  )
  strict_alignment: bool = setting(False, help=STRICT_ALIGNMENT_HELP)
  mirror: bool = setting(
    True, help="Whether to embed both the image and its mirror image."
  )
  weights: str = setting("auto", help=WEIGHTS_HELP, choices=WEIGHTS)
  batch_size: int = setting(
    128, help="Images per call of the network.", at_least=1, at_most=65_536
  )
  poll_seconds: float = setting(
    10.0, help="Seconds between two searches for new checkpoints.", at_least=0.01
  )
  start_timeout_seconds: float = setting(
    3600.0, help="Seconds to wait until there is a run in the workdir.", at_least=0.0
  )
  idle_timeout_seconds: float = setting(
    0.0,
    help="Seconds without a new checkpoint after which to give up; 0: never.",
    at_least=0.0,
  )


def main(settings: EvaluateConfig) -> int:
  """Opens the sets, waits for the run, and scores its checkpoints."""
  leave_training_cluster()
  is_writing = settings.checkpoint is None
  if is_writing and storage.exists(settings.workdir):
    storage.check_folder(settings.workdir, flag="workdir")
  strategies.share_gpus()
  sets = load_verification_sets(
    settings.verification_data, settings.cache_dir, cache_gb=settings.cache_gb
  )
  if settings.groups is not None:
    sets = add_groups(sets, settings.groups)
  _log_run_header(settings, sets)
  scorer = Scorer(sets, config.subset(ScoreSettings, settings))
  if settings.checkpoint is not None:
    return score_one(settings, scorer)
  if settings.once:
    evaluator.find_checkpoint(settings.workdir, None)
  else:
    evaluator.wait_for_run(
      settings.workdir,
      timeout_seconds=settings.start_timeout_seconds,
      poll_seconds=settings.poll_seconds,
    )
  return score_run(settings, scorer)


def score_one(settings: EvaluateConfig, scorer: Scorer) -> int:
  """Prints the scores of one checkpoint, as a JSON line a set on stdout."""
  scorer.load(evaluator.find_checkpoint(settings.workdir, settings.checkpoint))
  scorer.check_sets()
  rows = []
  for pair_set in scorer.plan.sets:
    row = scorer.score(scorer.embed(pair_set)).row
    logging.info("%s", report.line(row))
    print(json.dumps(row), flush=True)
    rows.append(row)
  if len(rows) > 1:
    logging.info("%s", report.mean_line(rows))
  return errors.ExitCode.DONE


def score_run(settings: EvaluateConfig, scorer: Scorer) -> int:
  """Scores every checkpoint that has no score yet; prints a table at the end.

  While one checkpoint's scores are computed and written, the next one embeds.
  """
  workdir, plan = settings.workdir, scorer.plan
  score_log = ScoreLog(storage.join(workdir, SCORE_LOG_NAME))
  corrupt = []
  best = None
  if settings.keep_best != "none":
    best = BestCheckpoint(workdir, plan, score_log, metric=settings.keep_best)
    best.update()  # a process before this one may have been killed in between
  backlog = evaluator.open_backlog(
    workdir,
    plan,
    score_log=score_log,
    policy=settings.policy,
    renew_seconds=settings.poll_seconds,
  )
  with (
    file_uploader(workdir) as copies,
    backlog,
    contextlib.closing(
      report.TensorBoard(storage.join(copies.folder, "tensorboard", plan.events_folder))
    ) as events,
    ReportWriter(workdir, events, has_page=settings.report) as drawing,
    _Background() as background,
  ):

    def write(step: int, embedded: Sequence[Embedded]) -> None:
      """Scores the embeddings of a step, and writes the scores."""
      for of_set in embedded:
        row, details = scorer.score(of_set)
        of_step = plan.of_step(step, [*score_log.rows(), row])
        is_mean_known = len(of_step) == len(plan.sets) > 1
        # before the row, so that a kill in between loses nothing
        events.write(row)
        if is_mean_known:
          events.write_mean(of_step)
        copies.sync()
        score_details.save(details, workdir)
        score_log.append(row)
        drawing.draw_pictures(row, details)
        logging.info("%s", report.line(row))
        if is_mean_known:
          logging.info("%s", report.mean_line(of_step))
      if best is not None:
        best.update()
      drawing.draw_page()
      backlog.mark_scored(step)

    for step in _steps(settings, backlog, background.finish):
      try:
        scorer.load(evaluator.find_checkpoint(workdir, str(step)))
      except errors.DataError as error:
        if step in evaluator.list_steps(workdir):
          corrupt.append(step)
          logging.error("step %d cannot be scored: %s", step, error)
          backlog.mark_scored(step)
        else:
          backlog.release(step)  # if pruning restores its marker, it is yielded again
        continue
      scorer.check_sets()  # its errors are not the checkpoint's
      missing = plan.missing(step, score_log.rows())
      embedded = [scorer.embed(pair_set) for pair_set in missing]
      background.start(functools.partial(write, step, embedded))
  evaluator.prune_after(workdir)
  rows = score_log.rows()
  unscored = read_rows(storage.join(workdir, UNSCORED_LOG_NAME))
  print(report.table(plan.matching(rows), plan.unscored(rows, unscored)), flush=True)
  if corrupt:
    logging.error("without a score, because corrupt: steps %s", corrupt)
  return errors.ExitCode.PARTIAL if corrupt else errors.ExitCode.DONE


class _Background:
  """Does one piece of work at a time in another thread."""

  def __init__(self) -> None:
    self._thread = futures.ThreadPoolExecutor(1)
    self._work: futures.Future[None] | None = None

  def start(self, work: Callable[[], None]) -> None:
    """Starts a piece of work, after the one before is finished; raises its error."""
    self.finish()
    self._work = self._thread.submit(work)

  def finish(self) -> bool:
    """Waits for the work, and raises its error; returns False if there is none."""
    work, self._work = self._work, None
    if work is None:
      return False
    work.result()
    return True

  def __enter__(self) -> "_Background":
    return self

  def __exit__(self, *error: object) -> None:
    self._thread.shutdown()


def add_groups(
  sets: tuple[VerificationSet, ...], path: str
) -> tuple[VerificationSet, ...]:
  """Returns the sets with the groups of their images.

  Raises:
    errors.DataError: The file is not lines of image,group, or no image of the sets is
      in a group.
  """
  names = [each.read_names() for each in sets]
  in_group = groups.read_groups(path, [name for of_set in names for name in of_set])
  parts = np.split(in_group, np.cumsum([each.num_images for each in sets])[:-1])
  return tuple(
    dataclasses.replace(each, groups=part if (part != "").any() else None)
    for each, part in zip(sets, parts, strict=True)
  )


def leave_training_cluster() -> None:
  """Removes TF_CONFIG, which a scheduler may set for all its processes.

  TensorFlow would make this process wait for the training's workers.
  """
  if os.environ.pop("TF_CONFIG", None) is not None:
    logging.info("TF_CONFIG is ignored: the evaluator is in no training cluster.")


def _log_run_header(
  settings: EvaluateConfig, sets: tuple[VerificationSet, ...]
) -> None:
  """Logs versions, config and sets."""
  logging.info("facedist %s, TensorFlow %s", __version__, tf.__version__)
  fields = dataclasses.asdict(settings).items()
  logging.info("config: %s", " ".join(f"{name}={value}" for name, value in fields))
  for each in sets:
    logging.info(
      "set %s: %d pairs of %d images, %d px, fingerprint %s",
      each.name,
      len(each.same),
      each.num_images,
      each.image_size,
      each.fingerprint,
    )


def _steps(
  settings: EvaluateConfig, backlog: evaluator.Backlog, finish: Callable[[], bool]
) -> Iterator[int]:
  """Yields the steps to score: with --once those of now, else until training is done.

  They are claimed: another evaluator of the same sets leaves them alone.

  Raises:
    errors.DataError: No new checkpoint came within --idle_timeout_seconds.
  """
  up_to = None
  if settings.once:
    up_to = max(evaluator.list_steps(settings.workdir), default=0)
  try:
    yield from evaluator.steps_to_score(
      backlog,
      is_done=lambda: settings.once or checkpoints.is_done(settings.workdir),
      poll_seconds=settings.poll_seconds,
      policy=settings.policy,
      up_to=up_to,
      finish=finish,
      idle_timeout_seconds=settings.idle_timeout_seconds,
    )
  except TimeoutError as error:
    raise errors.DataError(
      f"{settings.workdir} got no new checkpoint within --idle_timeout_seconds="
      f"{settings.idle_timeout_seconds:g}; look at the training's log, then start the "
      "evaluator again."
    ) from error


def run() -> None:
  """Runs the command line; --explain needs no run and no sets."""
  if any(word.partition("=")[0] == "--explain" for word in sys.argv[1:]):
    explain.run(sys.argv[1:])
  config.run_command(main, EvaluateConfig)


if __name__ == "__main__":
  run()
