"""Scores embeddings of labelled images by all their pairs (1:1) and as a search (1:N).

Works on any labelled set; embed it first:

  python -m facedist.embed --workdir=/runs/a --input=/data/faces --output=faces.json
  python -m facedist.identify --embeddings=faces.json

  --gallery=people.json   searches the images of --embeddings among those of this file,
                          and leaves out all_pairs; without it, each image is searched
                          among all others
  --groups=groups.csv     lines of image,group; images are called as in faces.json

It prints one JSON object:

  all_pairs       of all pairs of two images of --embeddings: num_same, num_different,
                  auc, eer, and tar_at_far: at FAR 1e-1, 1e-2, ... 1e-6, as far as there
                  are 1 / FAR different pairs, the tar and its threshold
  identification  num_probes, num_unmated (their identity is not in the gallery),
                  num_identities, rank_1, rank_5, cmc (ranks 1 to 20), and, for the open
                  set, tpir_at_fpir: the fraction of probes that are found at rank 1 and
                  accepted where at most the fraction fpir of unmated probes is accepted
  groups          with --groups: at each threshold of all_pairs, the tar and far of the
                  pairs within each group, and the largest gaps between two groups
  provenance      of each file: the hash of its embeddings, and its facts, such as the
                  hash of the weights

A tie counts against the network. Cosines of all pairs are rounded down to 1 / 65536.
Memory is 4 bytes times embedding_size for each image, however many pairs there are.
"""

import dataclasses
import functools
import json
from typing import Any

import numpy as np
from absl import logging

from facedist import config, errors
from facedist.config import setting
from facedist.evaluation import embeddings_file, groups, identification, provenance


@dataclasses.dataclass(frozen=True)
class IdentifyConfig:
  """Which embeddings are scored."""

  embeddings: str = setting(
    help="File of facedist.embed, in any of its formats.", path=True
  )
  gallery: str | None = setting(
    None,
    help="File of facedist.embed that the images of --embeddings are searched in. "
    "Without it, each is searched among all others.",
    path=True,
  )
  groups: str | None = setting(
    None,
    help="CSV file with a line image,group for each image of --embeddings that is in a "
    "group.",
    path=True,
  )


def main(settings: IdentifyConfig) -> int:
  """Reads the embeddings, scores them and prints the figures.

  Raises:
    errors.UsageError: --groups and --gallery were both given.
    errors.DataError: A file is not in its format, or holds too few identities.
  """
  if settings.groups is not None and settings.gallery is not None:
    raise errors.UsageError(
      f"--groups={settings.groups} is for all pairs of one set, which --gallery="
      f"{settings.gallery} leaves out; leave out one of them."
    )
  load = functools.partial(embeddings_file.load_embeddings, labelled=True)
  probes = load(settings.embeddings)
  gallery = None if settings.gallery is None else load(settings.gallery)
  if gallery is not None:
    embeddings_file.check_one_network(
      {settings.embeddings: probes, str(settings.gallery): gallery}
    )
  logging.info("%d embeddings of %s", len(probes.paths), settings.embeddings)
  names = probes.identities + ([] if gallery is None else gallery.identities)
  numbers = np.unique(names, return_inverse=True)[1]
  labels, gallery_labels = np.split(numbers, [len(probes.paths)])
  result: dict[str, Any] = {}
  if gallery is None:
    pairs = identification.all_pairs(
      identification.all_pairs_histograms(probes.embeddings, labels)
    )
    result["all_pairs"] = dataclasses.asdict(pairs)
    found = identification.identify(probes.embeddings, labels)
  else:
    found = identification.identify(
      probes.embeddings, labels, gallery.embeddings, gallery_labels
    )
  result["identification"] = dataclasses.asdict(found)
  if settings.groups is not None:
    in_group = groups.read_groups(settings.groups, probes.paths)
    result["groups"] = [
      dataclasses.asdict(each)
      for each in identification.by_group(
        probes.embeddings, labels, in_group, points=pairs.tar_at_far
      )
    ]
  files = {"embeddings": probes} | ({"gallery": gallery} if gallery else {})
  result["provenance"] = {
    name: {"crc32c": provenance.embeddings_crc32c(each.embeddings), **each.facts}
    for name, each in files.items()
  }
  print(json.dumps(result, indent=1), flush=True)
  return errors.ExitCode.DONE


def run() -> None:
  """Runs the command line."""
  config.run_command(main, IdentifyConfig)


if __name__ == "__main__":
  run()
