"""One network through many checkpoints, each scored on verification sets."""

import dataclasses
import functools
import time

import numpy as np

from facedist import errors
from facedist.evaluation import report
from facedist.evaluation.embedder import Embedder
from facedist.evaluation.ledger import Row
from facedist.evaluation.scoring import Agenda, PairSet, score
from facedist.training import checkpoints, loading


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
  """What is scored and how; named as the flags it comes from.

  Attributes:
    workdir: The run's folder.
    mirror: Whether an embedding is of image plus mirrored image.
    weights: One of `loading.WEIGHTS`.
    batch_size: Images a call of the network.
    strict_alignment: Whether to refuse sets that were aligned in another way than the
      training data.
  """

  workdir: str
  mirror: bool
  weights: str
  batch_size: int
  strict_alignment: bool = False


class Scorer:
  """Scores checkpoints of one run, with one network for all of them."""

  def __init__(self, sets: tuple[PairSet, ...], settings: ScoreSettings) -> None:
    """Reads nothing yet."""
    self._sets = sets
    self._settings = settings
    self._network: loading.Network | None = None
    self._checkpoint = ""

  @functools.cached_property
  def agenda(self) -> Agenda:
    """What is to be scored; the run's config.json must be there, and is read once.

    Raises:
      errors.UsageError: The run keeps no average of its weights, and it is asked for.
      errors.DataError: There is no config.json.
    """
    run = checkpoints.load_config(self._settings.workdir)
    weights = loading.choose_weights(run, self._settings.weights)
    return Agenda(self._sets, mirror=self._settings.mirror, weights=weights)

  def load(self, checkpoint: checkpoints.Checkpoint) -> None:
    """Loads a checkpoint's weights; the first time, the network as well.

    Raises:
      errors.UsageError: A set's images are not of the size that the network takes.
      errors.DataError: The checkpoint is damaged or was deleted, or with
        `strict_alignment` a set was aligned in another way than the training data.
    """
    image_size = int(checkpoint.marker()["image_size"])
    for pair_set in self._sets:
      if pair_set.image_size != image_size:
        raise errors.UsageError(
          f"--verification_data: the images of {pair_set.name} are "
          f"{pair_set.image_size} pixels wide, but the run in "
          f"{self._settings.workdir} takes {image_size}; build the set with "
          f"--image_size={image_size}."
        )
    if self._network is None:
      for pair_set in self._sets:
        loading.check_alignment(
          checkpoint,
          pair_set.alignment,
          data=f"--verification_data: {pair_set.name}",
          is_strict=self._settings.strict_alignment,
        )
      self._network = loading.load_network(
        self._settings.workdir, checkpoint, weights=self.agenda.weights
      )
    else:
      self._network.restore(checkpoint)
    self._checkpoint = checkpoint.name

  def score(self, pair_set: PairSet) -> tuple[Row, np.ndarray]:
    """Scores the loaded weights on a set.

    Returns:
      The row for metrics.jsonl, and uint8[height, width, 3], a picture of the scores.
    """
    if self._network is None:
      raise RuntimeError("load comes before score")
    embedder = Embedder(
      network=self._network.embed,
      network_name=self._network.name,
      batch_size=self._settings.batch_size,
      mirror=self._settings.mirror,
    )
    started = time.monotonic()
    cosines, result = score(embedder, pair_set)
    row = report.row(
      result,
      known_by=self.agenda.known_by(self._network.step, pair_set),
      checkpoint=self._checkpoint,
      images=pair_set.num_images,
      seconds=time.monotonic() - started,
    )
    title = f"{pair_set.name}, {self._network.name}"
    return row, report.picture(cosines, pair_set.same, result, title=title)
