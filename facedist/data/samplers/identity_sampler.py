"""Samples batches of P identities × K images, for losses that compare images.

Random batches of a large set contain few pairs of one person, and triplets need them.
So a step takes P identities and K images of each, again as a pure function of seed and
step:

- Identities go in rounds, of as many whole batches as there are identities for. The
  I mod P that are left over rest, others in each round, in turn; those that do not are
  permuted by the round's key. So no identity is twice in a batch, and after any number
  of rounds all have appeared equally often, or once less.
- From how often an identity has appeared follow its images: it too deals them out in
  rounds of whole hands of K, permuted by a key of its own, with n mod K of its n images
  resting in turn. Of an identity with fewer than K images each comes ⌊K / n⌋ times in
  every appearance, and the K mod n places that are left are dealt out in the same way.

Sample s of a batch is of its identity s mod P, so that a slice of the batch, which is
what a replica gets and its batch norm sees, has as many identities as it can.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from facedist import errors
from facedist.data import hashing
from facedist.data.samplers import epoch_sampler
from facedist.data.samplers.epoch_sampler import Batch, EpochSampler

# What keys are for, so that no two of them are the same.
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
  """Finds each identity's records; takes 16 bytes a record while it does.

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
    errors.UsageError: The batch is no multiple of P, or K is 1.
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
    identities_per_batch: P, at most the identities there are; divides the batch.
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
    """Steps in which no identity comes twice."""
    return self.groups.num_identities // self.identities_per_batch

  def samples_at(self, positions: np.ndarray) -> Batch:
    """Returns the samples at rising positions of the stream, int64[n], at least 0.

    The `epochs` of a batch count how often a record may have come before, so that no
    two samples have record and epoch alike.
    """
    steps, places = np.divmod(positions, self.global_batch)
    images, seats = np.divmod(places, self.identities_per_batch)
    identities, appearances = self._identities_at(steps, seats)
    return self._images_at(identities, appearances, images)

  def siblings(self, record: int, epoch: int) -> Iterator[int]:
    """Yields the identity's other records once each, from a keyed one on."""
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
    resting = total % self.identities_per_batch
    rounds, batches = np.divmod(steps, self.steps_a_round)
    shuffled = epoch_sampler.permute(
      batches * self.identities_per_batch + seats,
      epochs=rounds,
      num_records=total - resting,
      seed=self._derived_seed(_IDENTITIES),
    )
    identities = (rounds * resting + resting + shuffled) % total
    # Of all the rests so far, numbered, an identity has those that are it modulo I.
    rested = (rounds * resting + total - 1 - identities) // total
    return identities, rounds - rested

  def _images_at(
    self, identities: np.ndarray, appearances: np.ndarray, images: np.ndarray
  ) -> Batch:
    """Returns the samples that are the image so-and-so of an appearance."""
    first = self.groups.starts[identities]
    count = self.groups.starts[identities + 1] - first
    each = self.images_of_each
    copy, chosen = np.divmod(images, count)
    dealt = np.flatnonzero(copy == each // count)  # the others are each image's own
    chosen[dealt] = self._dealt(
      chosen[dealt],
      identities=identities[dealt],
      appearances=appearances[dealt],
      count=count[dealt],
      hand=each % count[dealt],
    )
    records = self.groups.records[first + chosen].astype(np.int64)
    return Batch(records, appearances * -(-each // count) + copy)

  def _dealt(
    self,
    places: np.ndarray,
    *,
    identities: np.ndarray,
    appearances: np.ndarray,
    count: np.ndarray,
    hand: np.ndarray,
  ) -> np.ndarray:
    """Returns which of an identity's `count` images lies at a place of a hand."""
    hands = count // hand
    rounds, turn = np.divmod(appearances, hands)
    shuffled = epoch_sampler.permute_groups(
      turn * hand + places,
      groups=rounds * self.groups.num_identities + identities,
      sizes=hands * hand,
      seed=self._derived_seed(_IMAGES),
    )
    resting = count % hand
    return (rounds * resting + resting + shuffled) % count

  def _derived_seed(self, use: int) -> int:
    """Returns a seed for one use, so that no two uses have the same keys."""
    return int(hashing.combine(self.seed, np.array(use))[0])
