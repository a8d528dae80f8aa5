"""Samples batches of P identities × K images, for losses that compare images.

Random batches of a large set contain few pairs of one person, and triplets need them.
So a step takes P identities and K images of each, again as a pure function of seed and
step:

- A round has as many whole batches as there are identities for. The I mod P identities
  that do not fill a batch are left out of it, others in each round; the rest are
  permuted by the round's key. So no identity occurs twice in a batch, and the numbers
  of appearances of two identities differ by at most one.
- The images of an identity follow from how often it has appeared. Its n images are
  permuted by a key and used in sets of K; the n mod K images that do not fill a set are
  left out, others in each pass. With fewer than K images, each image is used ⌊K / n⌋
  times in every appearance, and the K mod n places that are left are filled likewise.

Sample s of a batch shows its identity s mod P. So a replica's slice of the batch, and
the batch norm over it, has as many identities as possible.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from facedist import errors
from facedist.data import hashing
from facedist.data.samplers import epoch_sampler
from facedist.data.samplers.epoch_sampler import Batch, EpochSampler

# Uses of keys, so that no two have the same keys.
_IDENTITIES, _IMAGES, _REPLACEMENTS = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Groups:
  """The records of each identity: 4 bytes a record, 8 beyond 2^31 of them.

  Attributes:
    records: int32 or int64[records], sorted by label, and by number within a label.
    starts: int64[identities + 1], where each identity's records begin, then their
      number. Labels without a record are left out.
  """

  records: np.ndarray
  starts: np.ndarray

  @property
  def num_identities(self) -> int:
    """Identities that have a record."""
    return len(self.starts) - 1


def group(labels: np.ndarray) -> Groups:
  """Finds each identity's records; needs 16 bytes of memory a record.

  Args:
    labels: int32[records], of all records in order, at least 0.
  """
  counts = np.bincount(labels)
  kind = np.int32 if len(labels) < 2**31 else np.int64
  records = np.argsort(labels, kind="stable").astype(kind)
  return Groups(records, np.concatenate([[0], np.cumsum(counts[counts > 0])]))


def count_images(global_batch: int, identities_per_batch: int) -> int:
  """Returns K, the images of an identity in a batch of P identities.

  Raises:
    errors.UsageError: The batch is not a multiple of P, or K is 1.
  """
  images, rest = divmod(global_batch, identities_per_batch)
  if rest or images < 2:
    nearest = max(2, round(global_batch / identities_per_batch)) * identities_per_batch
    raise errors.UsageError(
      f"--global_batch={global_batch} must have the same number of images, 2 or more, "
      f"of each of --identities_per_batch={identities_per_batch}; try "
      f"--global_batch={nearest}."
    )
  return images


@dataclasses.dataclass(frozen=True)
class IdentitySampler(EpochSampler):
  """Samples identities, and images within them.

  Attributes:
    identities_per_batch: P, at most the number of identities; divides the batch.
    groups: The records of each identity, `num_records` in all.
  """

  identities_per_batch: int
  groups: Groups = dataclasses.field(compare=False, repr=False)

  def __post_init__(self) -> None:
    super().__post_init__()
    count_images(self.global_batch, self.identities_per_batch)
    if self.identities_per_batch > self.groups.num_identities:
      raise errors.UsageError(
        f"--identities_per_batch={self.identities_per_batch} is more than the "
        f"{self.groups.num_identities} identities that have images to train on; take "
        "fewer."
      )

  @property
  def images_of_each(self) -> int:
    """K, the images of an identity in a batch."""
    return self.global_batch // self.identities_per_batch

  @property
  def steps_a_round(self) -> int:
    """Steps of a round, in which no identity occurs twice."""
    return self.groups.num_identities // self.identities_per_batch

  def samples_at(self, positions: np.ndarray) -> Batch:
    """Returns the samples at rising positions of the stream, int64[n], at least 0.

    The `epochs` of a batch count how often a record may have been used before, so that
    no two samples have the same record and epoch.
    """
    steps, places = np.divmod(positions, self.global_batch)
    images, seats = np.divmod(places, self.identities_per_batch)
    identities, appearances = self._identities_at(steps, seats)
    return self._images_at(identities, appearances, images)

  def siblings(self, record: int, epoch: int) -> Iterator[int]:
    """Yields the identity's other records once each, starting at a keyed one."""
    (place,) = np.flatnonzero(self.groups.records == record)
    end = int(np.searchsorted(self.groups.starts, place, side="right"))
    first, stop = self.groups.starts[end - 1 : end + 1].tolist()
    count = stop - first - 1
    (key,) = hashing.combine(
      self._derived_seed(_REPLACEMENTS), *np.array([[record], [epoch]])
    ).tolist()
    for turn in range(count):
      step = 1 + (key + turn) % count
      yield int(self.groups.records[first + (place - first + step) % (count + 1)])

  def _identities_at(
    self, steps: np.ndarray, seats: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns identities, int64[n], and how often each has appeared before."""
    total = self.groups.num_identities
    num_left_out = total % self.identities_per_batch
    rounds, batches = np.divmod(steps, self.steps_a_round)
    shuffled = epoch_sampler.permute(
      batches * self.identities_per_batch + seats,
      epochs=rounds,
      num_records=total - num_left_out,
      seed=self._derived_seed(_IDENTITIES),
    )
    identities = (rounds * num_left_out + num_left_out + shuffled) % total
    # Identity i is left out by the omissions whose number is i modulo I.
    omitted = (rounds * num_left_out + total - 1 - identities) // total
    return identities, rounds - omitted

  def _images_at(
    self, identities: np.ndarray, appearances: np.ndarray, images: np.ndarray
  ) -> Batch:
    """Returns the samples for given images, int64[n] in [0, K), of appearances."""
    first = self.groups.starts[identities]
    count = self.groups.starts[identities + 1] - first
    each = self.images_of_each
    copy, chosen = np.divmod(images, count)
    extra = np.flatnonzero(copy == each // count)  # the others use each image equally
    chosen[extra] = self._shuffled_images(
      chosen[extra],
      identities=identities[extra],
      appearances=appearances[extra],
      count=count[extra],
      set_size=each % count[extra],
    )
    records = self.groups.records[first + chosen].astype(np.int64)
    return Batch(records, appearances * -(-each // count) + copy)

  def _shuffled_images(
    self,
    places: np.ndarray,
    *,
    identities: np.ndarray,
    appearances: np.ndarray,
    count: np.ndarray,
    set_size: np.ndarray,
  ) -> np.ndarray:
    """Returns which of an identity's `count` images is at a place of a set."""
    num_sets = count // set_size
    rounds, turn = np.divmod(appearances, num_sets)
    shuffled = epoch_sampler.permute_groups(
      turn * set_size + places,
      groups=rounds * self.groups.num_identities + identities,
      sizes=num_sets * set_size,
      seed=self._derived_seed(_IMAGES),
    )
    num_left_out = count % set_size
    return (rounds * num_left_out + num_left_out + shuffled) % count
