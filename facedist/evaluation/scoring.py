"""What is scored on which sets, and one score: embeddings judged pair by pair."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from facedist import progress, storage
from facedist.evaluation import verification
from facedist.evaluation.embedder import Batch, Embedder
from facedist.evaluation.ledger import Ledger, Row
from facedist.evaluation.verification import Verification


@dataclasses.dataclass(frozen=True)
class PairSet:
  """A verification set as scoring sees it.

  Attributes:
    name: What its scores go by, such as lfw.
    fingerprint: Hex digits that change with any image or pair.
    image_size: Height and width of every image in pixels.
    num_images: Number of images.
    read: Takes int64[n] image numbers; returns uint8[n, S, S, 3] RGB images.
    first: int[pairs], number of each pair's first image.
    second: int[pairs], number of its second image.
    same: bool[pairs].
    folds: int[pairs].
    alignment: How the images were cut; None where not known.
  """

  name: str
  fingerprint: str
  image_size: int
  num_images: int
  read: Callable[[np.ndarray], np.ndarray]
  first: np.ndarray
  second: np.ndarray
  same: np.ndarray
  folds: np.ndarray
  alignment: str | None = None

  def batches(self, batch_size: int) -> Iterator[Batch]:
    """Yields all images in order, with what to call each in an error."""
    for start in range(0, self.num_images, batch_size):
      numbers = np.arange(start, min(start + batch_size, self.num_images))
      yield self.read(numbers), [f"image {n} of {self.name}" for n in numbers]


@dataclasses.dataclass(frozen=True)
class Agenda:
  """What each checkpoint is to be scored on, and what of it is done.

  Attributes:
    sets: The verification sets.
    mirror: Whether an embedding is of image plus mirrored image.
    weights: Which weights of a checkpoint embed: trained, or ema, their average.
  """

  sets: tuple[PairSet, ...]
  mirror: bool
  weights: str = "trained"

  @property
  def fingerprint(self) -> str:
    """Returns hex digits that change with the sets or the way of embedding."""
    content = [*(each.fingerprint for each in self.sets), str(self.mirror)]
    content += [] if self.weights == "trained" else [self.weights]
    return f"{storage.crc32c_of(' '.join(content).encode()):08x}"

  @property
  def board(self) -> str:
    """Returns the name of the folder of its events, below tensorboard/."""
    return "evaluation" if self.weights == "trained" else f"evaluation_{self.weights}"

  def known_by(self, step: int, pair_set: PairSet) -> Row:
    """Returns the fields that tell a score from others, `ledger.Ledger.KEY`."""
    return {
      "step": step,
      "set": pair_set.name,
      "fingerprint": pair_set.fingerprint,
      "mirrored": self.mirror,
      "weights": self.weights,
    }

  def own(self, rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of these sets, as they are now, embedded in this way."""
    return [row for row in rows if any(self._is_of(row, each) for each in self.sets)]

  def missing(self, step: int, rows: Sequence[Row]) -> list[PairSet]:
    """Returns the sets on which `rows` have no score of this step."""
    of_step = [row for row in rows if row.get("step") == step]
    return [
      each for each in self.sets if not any(self._is_of(row, each) for row in of_step)
    ]

  def finished_steps(self, rows: Sequence[Row]) -> list[int]:
    """Returns the steps that have a score on every set."""
    counts = collections.Counter(row["step"] for row in self.own(rows))
    return [step for step, count in counts.items() if count == len(self.sets)]

  def _is_of(self, row: Row, pair_set: PairSet) -> bool:
    return Ledger.key(self.known_by(row.get("step", -1), pair_set)) == Ledger.key(row)


def score(embedder: Embedder, pair_set: PairSet) -> tuple[np.ndarray, Verification]:
  """Embeds all images of a set and judges its pairs; keeps the embeddings only.

  Args:
    embedder: The network.
    pair_set: What to score it on.

  Returns:
    float64[pairs] cosines, and the score.

  Raises:
    errors.DataError: An image is damaged, or an embedding zero or not finite.
  """
  batches = progress.over(
    embedder.stream(pair_set.batches(embedder.batch_size)),
    "embedded",
    total=pair_set.num_images,
    size=len,
  )
  embeddings = np.concatenate(list(batches))
  cosines = verification.cosine_scores(embeddings, pair_set.first, pair_set.second)
  return cosines, verification.verify(cosines, pair_set.same, pair_set.folds)
