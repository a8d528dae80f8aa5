"""Scores the checkpoints of a training run on verification sets.

`wait_for_run` and `find_checkpoint` find a run and its checkpoints from another
process. `Backlog` has the checkpoints that are not scored yet and holds a lease on
them, so that training does not delete them, and a claim on the one that is being
scored, so that no other evaluator scores it too. `ScorePlan` says what is to be scored,
and `Scorer` scores checkpoint after checkpoint with one network.
"""

import collections
import contextlib
import dataclasses
import functools
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from facedist import errors, progress, storage
from facedist.data.verification_set import VerificationSet
from facedist.evaluation import groups, provenance, report, score_details, verification
from facedist.evaluation.claims import Claims
from facedist.evaluation.embedder import Embedder, Stopwatch
from facedist.evaluation.provenance import PixelChecksum
from facedist.evaluation.score_details import HardPair, ScoreDetails
from facedist.evaluation.score_log import UNSCORED_LOG_NAME, Row, ScoreLog
from facedist.evaluation.verification import Verification
from facedist.training import inference
from facedist.training.checkpoint import checkpoints, manager
from facedist.training.checkpoint.checkpoints import Checkpoint

RENEW_SECONDS = 30.0
_SUFFIX = re.compile(r"\.(json|index|data-\d+-of-\d+)$")
_LOG_SECONDS = 30.0


def wait_for_run(workdir: str, *, timeout_seconds: float, poll_seconds: float) -> None:
  """Waits until training has written its config.json.

  Raises:
    errors.DataError: It did not within `timeout_seconds`.
  """
  path = storage.join(workdir, manager.CONFIG_NAME)
  started = time.monotonic()
  next_line = 0.0
  while not storage.exists(path):
    waited = time.monotonic() - started
    if waited >= timeout_seconds:
      raise errors.DataError(
        f"{path} did not appear within {timeout_seconds:g} s; start training with "
        f"--workdir={workdir}, or check its spelling."
      )
    if waited >= next_line:
      logging.info(
        "waiting for training to start, for %g s in all: there is no %s yet",
        timeout_seconds,
        path,
      )
      next_line += _LOG_SECONDS
    time.sleep(min(poll_seconds, timeout_seconds))


def find_checkpoint(workdir: str, wanted: str | None) -> Checkpoint:
  """Returns the complete checkpoint that `--checkpoint` names.

  Args:
    workdir: The run's folder.
    wanted: A step, a checkpoint's name such as step-00000100, or its path with or
      without a suffix; best for the one of best.json; None for the newest.

  Raises:
    errors.DataError: There is no such checkpoint, or it is not complete.
  """
  if wanted == "best":
    best = checkpoints.read_best(workdir)
    if best is None:
      raise errors.DataError(
        f"--checkpoint=best: there is no {checkpoints.best_path(workdir)}; run "
        f"facedist.evaluate --workdir={workdir} --keep_best=accuracy, or give a step."
      )
    wanted = str(best["step"])
  folder = checkpoints.folder(workdir)
  known = checkpoints.list_checkpoints(workdir)
  if wanted is None:
    if not known:
      raise errors.DataError(
        f"{folder} has no complete checkpoint; train with --workdir={workdir} first, "
        "or check its spelling."
      )
    return known[-1]
  for checkpoint in known:
    if wanted in (str(checkpoint.step), checkpoint.name):
      return checkpoint
  path = _SUFFIX.sub("", wanted)
  step = re.search(r"step-(\d+)$", path)
  if step and storage.exists(path + ".json") and storage.exists(path + ".index"):
    return Checkpoint(int(step[1]), path)
  steps = ", ".join(str(checkpoint.step) for checkpoint in known) or "none"
  raise errors.DataError(
    f"--checkpoint={wanted} is no complete checkpoint; give a path or a step of "
    f"{folder} (it has {steps})."
  )


def list_steps(workdir: str) -> list[int]:
  """Returns the steps of the complete checkpoints, increasing; lists the folder."""
  return [checkpoint.step for checkpoint in checkpoints.list_checkpoints(workdir)]


POLICIES = ("all", "latest")


class Backlog:
  """The checkpoints that are not scored yet, under a lease against deletion.

  Inside a `with` block a thread finds new checkpoints and renews the lease and the
  claims, so that checkpoints saved while another is being scored are not deleted
  either. Leaving the block after an error keeps the lease until it expires: a restart
  needs the same checkpoints.
  """

  def __init__(
    self,
    *,
    list_steps: Callable[[], Collection[int]],
    hold: Callable[[Collection[int]], None],
    claims: Claims,
    finished: Callable[[], Collection[int]],
    record: Callable[[int, str], None],
    waiting: Collection[int] = (),
    renew_seconds: float = RENEW_SECONDS,
  ) -> None:
    """Lists and holds nothing yet.

    Args:
      list_steps: Returns the steps of all complete checkpoints.
      hold: Keeps the checkpoints of these steps, and no others, from being deleted.
      claims: Of this evaluator, beside others of the same sets.
      finished: Returns the steps that need no score, whoever scored them.
      record: Records why a step gets no score: `skipped` or `missed`.
      waiting: Steps that an earlier process was still to score.
      renew_seconds: Time between two renewals.
    """
    self._list_steps = list_steps
    self._hold = hold
    self._claims = claims
    self._finished = finished
    self._record = record
    self._scored = set(finished())
    self._waiting = set(waiting) - self._scored  # were listed once
    self._absent: set[int] = set()  # of these, not in the last listing
    self._renew_seconds = renew_seconds
    self._lock = threading.Lock()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._keep_renewing, daemon=True)

  def refresh(self) -> list[int]:
    """Holds and returns the steps left to score, increasing.

    A checkpoint that was deleted before the lease was written is left out. One that is
    not there in two calls, since pruning may remove a marker for a moment, is recorded
    as missed; if it is saved again, it is scored after all.
    """
    with self._lock:
      wanted = set(self._list_steps()) - self._scored
      self._waiting |= wanted
      self._hold(self._waiting)
      left = wanted.intersection(self._list_steps()) if wanted else wanted
      absent = self._waiting - left
      for step in sorted(absent & self._absent):
        if step not in self._finished():
          logging.warning("step %d was deleted before it could be scored", step)
          self._record(step, "missed")
        self._waiting.remove(step)
      self._absent = absent & self._waiting
      return sorted(left)

  @property
  def is_certain(self) -> bool:
    """Whether no checkpoint has just disappeared, see `refresh`."""
    return not self._absent

  def claim(self, steps: Sequence[int], *, policy: str = "all") -> int | None:
    """Claims the next of these steps to score.

    Args:
      steps: What `refresh` returned.
      policy: all, or latest: only the last one is scored, and the others are recorded
        as skipped.

    Returns:
      The step, to be given to `mark_scored` or `release`; None if all of them are
      claimed, by this evaluator too, or scored.
    """
    for step in steps:
      if not self._claims.take(step):
        continue
      if step in self._finished():
        self.mark_scored(step)
      elif policy == "latest" and step != steps[-1]:
        logging.info("step %d is skipped: there is a newer one", step)
        self._record(step, "skipped")
        self.mark_scored(step)
      else:
        return step
    return None

  def mark_scored(self, step: int) -> None:
    """Takes a step off the backlog; the next refresh removes it from the lease."""
    with self._lock:
      self._scored.add(step)
      self._waiting.discard(step)
    self._claims.release(step)

  def release(self, step: int) -> None:
    """Ends the claim on a step that was not scored."""
    self._claims.release(step)

  def __enter__(self) -> "Backlog":
    self._thread.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self._stop.set()
    self._thread.join()
    if kind is not None:
      with contextlib.suppress(errors.FacedistError):
        self._claims.release_all()
    elif not self._claims.others():  # they share the lease
      self._hold(())

  def _keep_renewing(self) -> None:
    """Refreshes until told to stop; logs a failure and tries again."""
    while not self._stop.wait(self._renew_seconds):
      try:
        self.refresh()
        self._claims.renew()
      except Exception as error:  # whatever it is, scoring continues
        logging.warning("Could not renew the lease on checkpoints: %s", error)


def open_backlog(
  workdir: str,
  plan: "ScorePlan",
  *,
  score_log: ScoreLog,
  policy: str,
  renew_seconds: float,
) -> Backlog:
  """Returns the backlog of a run, with a lease in the name of the plan.

  Args:
    workdir: The run's folder.
    plan: What each checkpoint is scored on. After a restart, and in another evaluator
      of the same sets, the lease is the same one.
    score_log: Has the scores, of other evaluators too.
    policy: One of POLICIES.
    renew_seconds: Maximum time between two looks for new checkpoints.
  """
  unscored_log = ScoreLog(storage.join(workdir, UNSCORED_LOG_NAME))
  holder = f"evaluator-{plan.fingerprint}"

  def finished() -> list[int]:
    rows = score_log.rows()
    if policy == "latest":
      skipped = unscored_log.rows()
      rows += [row for row in skipped if row.get("reason") == "skipped"]
    return plan.finished_steps(rows)

  def record(step: int, reason: str) -> None:
    for pair_set in plan.missing(step, score_log.rows()):
      name = checkpoints.at(workdir, step).name
      facts = {"checkpoint": name, "reason": reason}
      unscored_log.append(plan.key_fields(step, pair_set) | facts)

  return Backlog(
    list_steps=lambda: list_steps(workdir),
    hold=lambda wanted: checkpoints.hold(workdir, holder, wanted),
    claims=Claims(workdir, plan.fingerprint),
    finished=finished,
    record=record,
    waiting=checkpoints.leased_steps(workdir, holder),
    renew_seconds=min(renew_seconds, RENEW_SECONDS),
  )


def steps_to_score(
  backlog: Backlog,
  *,
  is_done: Callable[[], bool],
  poll_seconds: float,
  policy: str = "all",
  up_to: int | None = None,
  finish: Callable[[], bool] = lambda: False,
  idle_timeout_seconds: float = 0.0,
  sleep: Callable[[float], Any] = time.sleep,
) -> Iterator[int]:
  """Yields each step to score, increasing, until training is done and none is left.

  Steps that another evaluator is scoring are left to it, and waited for. The caller
  gives each step to `mark_scored`, at the latest in `finish`, or to `release`, and then
  it is yielded again.

  Args:
    backlog: What is left to score.
    is_done: Returns whether training has saved its last checkpoint.
    poll_seconds: Time between two looks while there is nothing to score.
    policy: One of POLICIES, see `Backlog.claim`.
    up_to: The last step to score; None for no limit.
    finish: Waits for what the caller is still doing with earlier steps, and returns
      whether there was anything. It is called when there is nothing else to score.
    idle_timeout_seconds: Time without a new checkpoint after which to give up; 0 waits
      without limit.
    sleep: Waits that many seconds.

  Raises:
    TimeoutError: There was nothing to score for `idle_timeout_seconds`.
  """
  idle_seconds = 0.0
  while True:
    done = is_done()  # asked first, so that the list below includes the last step
    steps = [step for step in backlog.refresh() if up_to is None or step <= up_to]
    if steps:
      idle_seconds = 0.0
    step = backlog.claim(steps, policy=policy)
    if step is not None:
      yield step
    elif finish():
      continue
    elif done and not steps and backlog.is_certain:
      return
    elif 0 < idle_timeout_seconds <= idle_seconds:
      raise TimeoutError
    else:
      sleep(poll_seconds)
      idle_seconds += poll_seconds


def prune_after(workdir: str) -> None:
  """Deletes, if training is done, what the caller's lease kept beyond --keep_last."""
  if not checkpoints.is_done(workdir):
    return
  try:
    run = checkpoints.load_config(workdir)
    checkpoints.prune(workdir, keep_last=run.keep_last, keep_every=run.keep_every)
  except errors.FacedistError as error:
    logging.warning("checkpoints beyond --keep_last are not deleted: %s", error)


@dataclasses.dataclass(frozen=True)
class ScorePlan:
  """What each checkpoint is scored on; compares it with the rows of the score log.

  Attributes:
    sets: The verification sets.
    mirror: Whether an embedding is of image plus mirrored image.
    weights: Which weights of a checkpoint embed: trained, or ema, their average.
  """

  sets: tuple[VerificationSet, ...]
  mirror: bool
  weights: str = "trained"

  @property
  def fingerprint(self) -> str:
    """Hex digits that change with the sets or the way of embedding."""
    content = [*(each.fingerprint for each in self.sets), str(self.mirror)]
    content += [] if self.weights == "trained" else [self.weights]
    return f"{storage.crc32c_of(' '.join(content).encode()):08x}"

  @property
  def events_folder(self) -> str:
    """The name of the folder of its events, below tensorboard/."""
    return "evaluation" if self.weights == "trained" else f"evaluation_{self.weights}"

  def key_fields(self, step: int, pair_set: VerificationSet) -> Row:
    """Returns the fields that identify a score, those of `ScoreLog.KEY`."""
    return {
      "step": step,
      "set": pair_set.name,
      "fingerprint": pair_set.fingerprint,
      "mirrored": self.mirror,
      "weights": self.weights,
    }

  def matching(self, rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of these sets, as they are now, embedded in this way."""
    return [row for row in rows if any(self._is_of(row, each) for each in self.sets)]

  def of_step(self, step: int, rows: Sequence[Row]) -> list[Row]:
    """Returns the matching rows of one step, one for each set that has one."""
    some = {row["set"]: row for row in self.matching(rows) if row["step"] == step}
    return [some[each.name] for each in self.sets if each.name in some]

  def missing(self, step: int, rows: Sequence[Row]) -> list[VerificationSet]:
    """Returns the sets on which `rows` have no score of this step."""
    of_step = [row for row in rows if row.get("step") == step]
    return [
      each for each in self.sets if not any(self._is_of(row, each) for row in of_step)
    ]

  def finished_steps(self, rows: Sequence[Row]) -> list[int]:
    """Returns the steps that have a score on every set."""
    counts = collections.Counter(row["step"] for row in self.matching(rows))
    return [step for step, count in counts.items() if count == len(self.sets)]

  def unscored(self, rows: Sequence[Row], unscored: Sequence[Row]) -> list[Row]:
    """Returns the rows of `unscored` that are of this plan and still have no score."""
    scored = {ScoreLog.key(row) for row in rows}
    return [row for row in self.matching(unscored) if ScoreLog.key(row) not in scored]

  def _is_of(self, row: Row, pair_set: VerificationSet) -> bool:
    return ScoreLog.key(self.key_fields(row.get("step", -1), pair_set)) == ScoreLog.key(
      row
    )


def embed_set(
  embedder: Embedder, pair_set: VerificationSet, pixels: PixelChecksum | None = None
) -> np.ndarray:
  """Embeds all images of a set; keeps only the embeddings in memory.

  Args:
    embedder: Has the network.
    pair_set: What to embed.
    pixels: Gets the pixels that are embedded.

  Returns:
    float32[images, embedding].

  Raises:
    errors.DataError: An image is corrupt, or an embedding zero or not finite.
  """
  images = pair_set.batches(embedder.batch_size)
  batches = progress.over(
    embedder.stream(images if pixels is None else pixels.over(images)),
    "embedded",
    total=pair_set.num_images,
    size=len,
  )
  return np.concatenate(list(batches))


def verify_set(
  pair_set: VerificationSet, embeddings: np.ndarray
) -> tuple[np.ndarray, Verification]:
  """Verifies the pairs of a set.

  Args:
    pair_set: What was embedded.
    embeddings: float32[images, embedding], of length 1.

  Returns:
    float64[pairs] cosines, and the score.
  """
  cosines = verification.cosine_scores(embeddings, pair_set.first, pair_set.second)
  identities = None
  if pair_set.labels is not None:
    identities = pair_set.labels[np.stack([pair_set.first, pair_set.second], axis=1)]
  return cosines, verification.verify(
    cosines, pair_set.same, pair_set.folds, identities=identities
  )


def set_provenance(pair_set: VerificationSet, images_crc32c: str) -> dict[str, Any]:
  """Returns what the provenance says of a set whose images have that hash."""
  return {
    "set": pair_set.name,
    "fingerprint": pair_set.fingerprint,
    "pairs_crc32c": provenance.pairs_crc32c(
      pair_set.first, pair_set.second, pair_set.same, pair_set.folds
    ),
    "images_crc32c": images_crc32c,
    "identities_crc32c": provenance.identities_crc32c(pair_set.labels),
    "groups_crc32c": provenance.groups_crc32c(pair_set.groups),
    "alignment": pair_set.alignment,
  }


def details_of(
  key: Row,
  pair_set: VerificationSet,
  embeddings: np.ndarray,
  cosines: np.ndarray,
  result: Verification,
) -> ScoreDetails:
  """Collects what the report shows of a score; reads the images of its hardest pairs.

  Args:
    key: The fields of `ScoreLog.KEY`.
    pair_set: What was scored.
    embeddings: float32[images, embedding].
    cosines: float64[pairs].
    result: The score.
  """
  threshold = float(np.mean(result.fold_thresholds))
  names = pair_set.read_names()

  def hard_pairs(places: np.ndarray) -> tuple[HardPair, ...]:
    """Returns the names and images of some pairs."""
    both = np.stack([pair_set.first[places], pair_set.second[places]], axis=1)
    jpegs = [score_details.encode(image) for image in pair_set.read(both.ravel())]
    return tuple(
      HardPair(
        score=float(cosines[pair]),
        names=(names[first], names[second]),
        jpegs=(jpegs[2 * place], jpegs[2 * place + 1]),
      )
      for place, (pair, (first, second)) in enumerate(zip(places, both, strict=True))
    )

  accepts, rejects = score_details.hardest(cosines, pair_set.same, threshold)
  map_points, map_labels = score_details.map_points(embeddings, pair_set.labels)
  return ScoreDetails(
    key=key,
    threshold=threshold,
    scores=cosines.astype(np.float32),
    same=pair_set.same,
    false_accepts=hard_pairs(accepts),
    false_rejects=hard_pairs(rejects),
    map_points=map_points,
    map_labels=map_labels,
  )


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
  """How checkpoints are scored; the fields are named as their flags.

  Attributes:
    workdir: The run's folder.
    mirror: Whether an embedding is of image plus mirrored image.
    weights: One of `inference.WEIGHTS`.
    batch_size: Images per call of the network.
    strict_alignment: Whether to refuse sets that were aligned in another way than the
      training data.
  """

  workdir: str
  mirror: bool
  weights: str
  batch_size: int
  strict_alignment: bool = False


class Embedded(NamedTuple):
  """The embeddings of one checkpoint on one set, which are still to be scored.

  Attributes:
    step: Of the checkpoint.
    made_by: What the provenance says of the checkpoint and its network.
    pair_set: The set.
    embeddings: float32[images, embedding], of length 1.
    images_crc32c: Of the pixels that were embedded.
    seconds: Time to embed them.
  """

  step: int
  made_by: dict[str, Any]
  pair_set: VerificationSet
  embeddings: np.ndarray
  images_crc32c: str
  seconds: float


class Scored(NamedTuple):
  """The score of one checkpoint on one set.

  Attributes:
    row: The row for metrics.jsonl.
    details: What the report shows beside it.
  """

  row: Row
  details: ScoreDetails


class Scorer:
  """Scores the checkpoints of a run, with one network for all of them."""

  def __init__(
    self, sets: tuple[VerificationSet, ...], settings: ScoreSettings
  ) -> None:
    """Reads nothing yet."""
    self._sets = sets
    self._is_checked = False
    self._settings = settings
    self._network: inference.InferenceNetwork | None = None
    self._marker: dict[str, Any] = {}
    self._made_by: dict[str, Any] = {}
    self._forward_time = Stopwatch()

  @property
  def forward_seconds(self) -> float:
    """Time that the network took so far; the first batch's includes its compilation."""
    return self._forward_time.seconds

  @functools.cached_property
  def plan(self) -> ScorePlan:
    """What is to be scored; reads the run's config.json once.

    Raises:
      errors.UsageError: --weights=ema, but the run keeps no average of its weights.
      errors.DataError: There is no config.json.
    """
    run = checkpoints.load_config(self._settings.workdir)
    weights = inference.choose_weights(run, self._settings.weights)
    return ScorePlan(self._sets, mirror=self._settings.mirror, weights=weights)

  def load(self, checkpoint: checkpoints.Checkpoint) -> None:
    """Loads a checkpoint's weights; the first time, builds the network too.

    Raises:
      errors.DataError: The checkpoint is corrupt or was deleted.
    """
    self._marker = marker = checkpoint.marker()
    if self._network is None:
      self._network = inference.load_network(
        self._settings.workdir, checkpoint, weights=self.plan.weights
      )
    else:
      self._network.restore(checkpoint)
    self._made_by = inference.network_facts(
      self._network, checkpoint, normalize=True, mirror=self._settings.mirror
    ) | {
      "pixel_normalization": self._network.pixel_normalization,
      "policy": self._network.policy,
      "training_data": marker.get("data_fingerprint"),
      "training_alignment": marker.get("alignment"),
    }

  def check_sets(self) -> None:
    """Checks that the sets fit the run; once, after the first checkpoint is loaded.

    Raises:
      errors.UsageError: A set's images are not of the size that the network takes.
      errors.DataError: With `strict_alignment`, a set was aligned in another way than
        the training data.
    """
    if not self._is_checked:
      inference.check_verification_sets(
        self._marker, self._sets, is_strict=self._settings.strict_alignment
      )
      self._is_checked = True

  def embed(self, pair_set: VerificationSet) -> Embedded:
    """Embeds a set with the loaded weights."""
    if self._network is None:
      raise RuntimeError("call load before embed")
    embedder = Embedder(
      network=self._network.embed,
      network_name=self._network.name,
      batch_size=self._settings.batch_size,
      mirror=self._settings.mirror,
      forward_time=self._forward_time,
    )
    started = time.monotonic()
    pixels = PixelChecksum()
    embeddings = embed_set(embedder, pair_set, pixels)
    return Embedded(
      step=self._network.step,
      made_by=self._made_by,
      pair_set=pair_set,
      embeddings=embeddings,
      images_crc32c=pixels.text(),
      seconds=time.monotonic() - started,
    )

  def score(self, embedded: Embedded) -> Scored:
    """Scores embeddings; another thread may embed the next ones meanwhile."""
    pair_set = embedded.pair_set
    started = time.monotonic()
    cosines, result = verify_set(pair_set, embedded.embeddings)
    key = self.plan.key_fields(embedded.step, pair_set)
    row = report.row(
      result,
      key_fields=key,
      checkpoint=embedded.made_by["checkpoint"],
      images=pair_set.num_images,
      seconds=embedded.seconds + time.monotonic() - started,
    )
    if pair_set.groups is not None:
      both = np.stack([pair_set.first, pair_set.second], axis=1)
      results = groups.verify_by_group(
        cosines, pair_set.same, pair_set.folds, pair_set.groups[both]
      )
      row["by_group"] = dataclasses.asdict(results)
    row["provenance"] = {
      **set_provenance(pair_set, embedded.images_crc32c),
      **embedded.made_by,
      "batch_size": self._settings.batch_size,
      **provenance.environment(),
    }
    return Scored(row, details_of(key, pair_set, embedded.embeddings, cosines, result))
