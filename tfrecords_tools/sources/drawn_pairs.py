"""Pairs for verification, drawn from any labelled set by a seed.

Ten folds have distinct identities, and as many pairs of one person as of two. The pairs
depend on the seed and on the images' paths alone: every number is a keyed hash, so each
machine, version of Python and order of files draws the same ones.

Each fold gets a tenth of the identities, in the order of a hash of their names. A pair
of one person is of an identity with two images or more, each as likely as another, and
of two of its images; a pair of two people is of two identities, and of an image of
each. This is how LFW's pairs were drawn. No pair comes twice.
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from facedist import errors
from tfrecords_tools.sources import base, pair_list

CSV_NAME = "pairs.csv"
NUM_FOLDS = 10
STEP = 2 * NUM_FOLDS
"""Pairs of a list are a multiple of it."""
_LARGER = (
  "take a larger set, with two identities of several images in each fold, 20 in all"
)


def draw_set(images: base.Source, *, num_pairs: int, seed: int) -> base.Source:
  """Returns the verification set of pairs that are drawn from the images.

  Memory holds all paths, about 300 bytes an image.

  Args:
    images: A labelled set; its groups are iterated.
    num_pairs: A multiple of `STEP`.
    seed: Decides the folds and the pairs.

  Raises:
    errors.UsageError: There are too few identities or images for so many pairs.
  """
  groups = list(images.groups)
  pairs = draw(
    {group.identity: group.paths for group in groups}, num_pairs=num_pairs, seed=seed
  )
  needed = {image for pair in pairs for image in (pair.first, pair.second)}
  kept = []
  for group in groups:
    is_needed = np.array([path in needed for path in group.paths])
    if is_needed.any():
      kept.append(group.take(is_needed))
  ordered = (path for group in kept for path in group.paths)
  number_of = {path: number for number, path in enumerate(ordered)}

  def explain_broken(path: str, reason: str) -> str:
    return (
      f"{images.folder}: {path}: {reason}; --make_pairs needs every image of its "
      "pairs: repair the image and start again to continue, or take it out of the set "
      "and build into a new folder."
    )

  return dataclasses.replace(
    images,
    groups=kept,
    explain_broken=explain_broken,
    pairs=pair_list.table_of(pairs, number_of),
    pairs_csv=to_csv(pairs),
    num_folds=NUM_FOLDS,
  )


def draw(
  paths_of: Mapping[str, Sequence[str]], *, num_pairs: int, seed: int
) -> list[pair_list.Pair]:
  """Draws pairs, fold by fold, those of one person first.

  Args:
    paths_of: Each identity's images.
    num_pairs: A multiple of `STEP`.
    seed: Decides the folds and the pairs.

  Raises:
    errors.UsageError: There are too few identities or images for so many pairs.
  """
  order = sorted(paths_of, key=lambda name: (_hash(f"fold {seed}", name), name))
  folds = [sorted(order[fold::NUM_FOLDS]) for fold in range(NUM_FOLDS)]
  of_each_kind = num_pairs // STEP
  _check_enough(folds, paths_of, of_each_kind=of_each_kind)
  pairs: list[pair_list.Pair] = []
  for fold, identities in enumerate(folds):
    images = [sorted(paths_of[identity]) for identity in identities]
    for same, drawn in (
      (True, _draw_same(images, f"same {seed} {fold}")),
      (False, _draw_different(images, f"different {seed} {fold}")),
    ):
      distinct = _distinct(drawn)
      for first, second in itertools.islice(distinct, of_each_kind):
        pairs.append(pair_list.Pair(first, second, same, fold, len(pairs) + 2))
  return pairs


def _check_enough(
  folds: Sequence[Sequence[str]],
  paths_of: Mapping[str, Sequence[str]],
  *,
  of_each_kind: int,
) -> None:
  """Raises UsageError if a fold has not that many pairs of each kind."""
  most = of_each_kind
  for identities in folds:
    counts = [len(paths_of[identity]) for identity in identities]
    same = sum(math.comb(count, 2) for count in counts)
    most = min(most, same, math.comb(sum(counts), 2) - same)
  if most < of_each_kind:
    fix = f"--make_pairs={most * STEP} is possible" if most else _LARGER
    raise errors.UsageError(
      f"--make_pairs={of_each_kind * STEP} needs {of_each_kind} pairs of one person "
      f"and as many of two in each of {NUM_FOLDS} folds of distinct identities, which "
      f"{len(paths_of)} identities do not have; {fix}."
    )


def _draw_same(images: list[list[str]], key: str) -> Iterator[tuple[str, str]]:
  """Draws two images of one identity, without end."""
  several = [paths for paths in images if len(paths) > 1]
  numbers = _numbers(key)
  while True:
    paths = several[next(numbers) % len(several)]
    first, second = _two(numbers, len(paths))
    yield paths[first], paths[second]


def _draw_different(images: list[list[str]], key: str) -> Iterator[tuple[str, str]]:
  """Draws an image of each of two identities, without end."""
  numbers = _numbers(key)
  while True:
    first, second = (images[place] for place in _two(numbers, len(images)))
    yield first[next(numbers) % len(first)], second[next(numbers) % len(second)]


def _two(numbers: Iterator[int], count: int) -> tuple[int, int]:
  """Draws two distinct places of `count`."""
  first, second = next(numbers) % count, next(numbers) % (count - 1)
  return first, second + (second >= first)


def _distinct(drawn: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
  """Yields each pair once, in whichever order of its images it came first."""
  seen: set[tuple[str, ...]] = set()
  for pair in drawn:
    key = tuple(sorted(pair))
    if key not in seen:
      seen.add(key)
      yield pair


def _numbers(key: str) -> Iterator[int]:
  """Yields 64 random bits after 64 others, by a key."""
  return (_hash(key, str(count)) for count in itertools.count())


def _hash(key: str, text: str) -> int:
  """Returns 64 bits of a keyed hash."""
  keyed = hashlib.blake2b(text.encode(), key=key.encode(), digest_size=8)
  return int.from_bytes(keyed.digest(), "little")


def to_csv(pairs: Sequence[pair_list.Pair]) -> bytes:
  """Returns the list as `pair_list.read` reads it."""
  stream = io.StringIO()
  writer = csv.writer(stream, lineterminator="\n")
  writer.writerow(("image1", "image2", "same", "fold"))
  for pair in pairs:
    writer.writerow((pair.first, pair.second, int(pair.same), pair.fold))
  return stream.getvalue().encode()
