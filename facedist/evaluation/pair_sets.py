"""Opens the verification sets that --verification_data names."""

import functools
import os
from collections import Counter

from facedist import errors
from facedist.config import paths
from facedist.data import verification_set
from facedist.data.cache import staged_dataset
from facedist.evaluation.evaluator import PairSet


def load_sets(folders: str, cache_dir: str, *, cache_gb: float) -> tuple[PairSet, ...]:
  """Opens the verification sets of --verification_data; copies those in buckets.

  A set is called as NAME in NAME=FOLDER, or as its data set; sets of the same data set
  are called as their folders.

  Raises:
    errors.UsageError: No folder, or two sets of one name.
    errors.DataError: A folder has no verification set.
  """
  opened = []
  for part in paths.split_list(folders):
    name, folder = paths.split_name(part)
    staged = staged_dataset.stage(folder, cache_dir, cache_gb=cache_gb)
    pairs = verification_set.load_verification_set(staged.folder, files_of=staged.files)
    opened.append((name, os.path.basename(os.path.abspath(folder)), pairs))
  counts = Counter(pairs.name for name, _, pairs in opened if name is None)
  sets = tuple(
    _pair_set(pairs, name or (pairs.name if counts[pairs.name] == 1 else last_part))
    for name, last_part, pairs in opened
  )
  if not sets or len({each.name for each in sets}) < len(sets):
    raise errors.UsageError(
      f"--verification_data={folders} must be one or more folders, with commas between "
      "them, of different names; to name a set, write NAME=FOLDER."
    )
  return sets


def _pair_set(pairs: verification_set.VerificationSet, name: str) -> PairSet:
  """Returns a verification set as plain values."""
  return PairSet(
    name=name,
    fingerprint=pairs.reader.manifest.fingerprint,
    image_size=pairs.reader.image_size,
    num_images=pairs.reader.num_records,
    read=lambda numbers: pairs.reader.read_batch(numbers)[0],
    read_names=functools.cache(pairs.reader.filenames),
    first=pairs.first,
    second=pairs.second,
    same=pairs.same,
    folds=pairs.folds,
    labels=pairs.reader.labels(),
    alignment=pairs.alignment,
  )
