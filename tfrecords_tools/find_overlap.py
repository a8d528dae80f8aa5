"""Finds people of a training set who are also in a verification set, by their faces.

A model that was trained on them scores too well there. Embed both sets with the same
checkpoint and flags, compare, and select without those found:

  python -m facedist.embed --workdir=/runs/a --input=/data/vggface2_112 --split=train \\
    --output=train.json
  python -m facedist.embed --workdir=/runs/a --input=/data/lfw_112 --output=lfw.json
  python -m tfrecords_tools.find_overlap --embeddings=train.json --others=lfw.json \\
    --report=overlap.json --write_excluded=in_lfw.txt
  python -m tfrecords_tools.select --input_dirs=/data/vggface2_112 \\
    --exclude_identities=in_lfw.txt --output_dir=/data/vggface2_fair

The cosine of two identities is that of the means of their unit embeddings. Those above
--threshold are printed, best first. What is high depends on the network, so the
quantiles are printed too, of all pairs and of each identity's best match: people who
are in both sets stand out above the bulk.

What --threshold means for these embeddings is measured on --others, whose identities
are known: the fraction of pairs of different people above it (of the first 8,192), how
many of the pairs found are chance matches by that fraction, and the fraction of people
whose own images, every second one and the others, are not above it. If more than a
tenth of the pairs found are chance matches, the command advises against excluding them.
The quantiles of both kinds help to choose a threshold; look at the faces near it, too.

--lfw_names, with --identity_meta where the identities are numbers, adds those whose
names are in the list, as tfrecords_tools.build does.

The report is a JSON object:

  format, format_version   "facedist-overlap-report", 1
  embeddings, others       the files
  model, weights_crc32c    what made the embeddings
  threshold                as given
  pairs                    best first, each an object with
    cosine                 of the two means
    identity, other        as the two files call them
    name                   of the person, from --identity_meta, or null
    same_name              whether name, or identity, and other are spelled alike
    images, other_images   how many the means are of
  false_match_rate         fraction of pairs of different identities of --others above
                           the threshold, or null where there is one identity
  false_matches            that fraction of all pairs that were compared
  miss_rate                fraction of identities of --others, of two images or more,
                           the means of whose two halves are not above it, or null
  by_name                  identities found with --lfw_names, or null
  excluded                 all identities found, sorted, as in --write_excluded
  quantiles                cosines by quantile, of "all_pairs" (to 0.001) and
                           "best_matches", each of --embeddings with all others; and
                           of --others alone, "different_people" and "same_people"

The exit code is 0, whether pairs are found or not. Every file may be in a bucket.
Memory is 4 bytes times embedding_size for each identity, twice that for --others,
however many images there are.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from absl import logging

from facedist import config, storage
from facedist.config import setting
from tfrecords_tools import reports
from tfrecords_tools.overlap import centroids, similarity
from tfrecords_tools.sources import lfw, tables

_PRINTED = 50  # pairs; the report has all
_MAX_CHANCE = 0.1  # of the pairs found; with more, excluding them is not advised


@dataclasses.dataclass(frozen=True)
class OverlapConfig:
  """The flags of this command."""

  embeddings: str = setting(
    help="JSON file that facedist.embed wrote for the training set.", path=True
  )
  others: str = setting(
    help="JSON file that facedist.embed wrote for the verification set.", path=True
  )
  threshold: float = setting(
    0.5,
    help="Cosine above which two identities count as the same person.",
    at_least=-1.0,
  )
  report: str | None = setting(None, help="JSON file for all pairs found.", path=True)
  write_excluded: str | None = setting(
    None,
    help="File for the identities found, one per line: for --exclude_identities.",
    path=True,
  )
  lfw_names: str | None = setting(
    None,
    help="LFW's pairs.txt or people.txt: also finds identities by name.",
    path=True,
  )
  identity_meta: str | None = setting(
    None,
    help="CSV of people's names, as VGGFace2's identity_meta.csv.",
    path=True,
  )


def main(settings: OverlapConfig) -> None:
  """Compares all identities of the two files; prints and writes what is found."""
  storage.check_file(settings.report, flag="report")
  storage.check_file(settings.write_excluded, flag="write_excluded")
  ours = centroids.read_centroids(settings.embeddings)
  others = centroids.read_centroids(settings.others, with_halves=True)
  centroids.check_alike(ours, others)
  found = similarity.compare_identities(ours, others, threshold=settings.threshold)
  reference = similarity.refer(others, threshold=settings.threshold)
  meta = settings.identity_meta
  people = tables.read_identity_names(meta) if meta else {}
  pairs = [entry_of(pair, ours, others, people=people) for pair in found.pairs]
  by_name = None
  if settings.lfw_names:
    named = {identity: people.get(identity, identity) for identity in ours.names}
    listed = lfw.read_people(settings.lfw_names)
    by_name = lfw.overlapping(named, listed)
  excluded = sorted({pair["identity"] for pair in pairs}.union(by_name or ()))
  quantiles = found.quantiles() | reference.quantiles()
  rate = reference.false_match_rate
  meaning = {
    "false_match_rate": rate,
    "false_matches": None if rate is None else rate * int(found.histogram.sum()),
    "miss_rate": reference.miss_rate,
  }
  head = {
    "format": "facedist-overlap-report",
    "format_version": 1,
    "embeddings": settings.embeddings,
    "others": settings.others,
    "model": ours.facts["model"],
    "weights_crc32c": ours.facts["weights_crc32c"],
    "threshold": settings.threshold,
  }
  with reports.new_report(settings.report, head, name="pairs") as report:
    for pair in pairs:
      report.add(pair)
    report.close(
      meaning | {"by_name": by_name, "excluded": excluded, "quantiles": quantiles}
    )
  print(table(pairs, quantiles))
  logging.info(
    "%d of %d identities are found in %s: %d pairs above --threshold=%g, %s by name",
    len(excluded),
    len(ours.names),
    settings.others,
    len(pairs),
    settings.threshold,
    "none looked for" if by_name is None else len(by_name),
  )
  logging.info("%s", explain(settings.threshold, **meaning))
  if settings.write_excluded:
    with reports.new_text(settings.write_excluded) as stream:
      stream.writelines(f"{identity}\n" for identity in excluded)
  by_chance = (meaning["false_matches"] or 0) / len(pairs) if pairs else 0
  if by_chance > _MAX_CHANCE:
    logging.warning(
      "about %.0f %% of the pairs found are chance matches: --threshold=%g cannot tell "
      "people apart, so excluding these identities is not advised; raise it (see the "
      "quantiles of different people), or embed with a better network",
      min(100 * by_chance, 100),
      settings.threshold,
    )
  elif excluded:
    logging.info(
      "a fair score leaves them out: tfrecords_tools.select --exclude_identities=%s",
      settings.write_excluded or "FILE, which --write_excluded=FILE writes",
    )


def entry_of(
  pair: similarity.SimilarPair,
  ours: centroids.Centroids,
  others: centroids.Centroids,
  *,
  people: Mapping[str, str],
) -> dict[str, Any]:
  """Returns the report's entry for a pair."""
  identity, other = ours.names[pair.first], others.names[pair.second]
  spelled = lfw.normalise(people.get(identity, identity))
  return {
    "cosine": round(pair.cosine, 6),
    "identity": identity,
    "other": other,
    "name": people.get(identity),
    "same_name": spelled == lfw.normalise(other),
    "images": ours.counts[pair.first],
    "other_images": others.counts[pair.second],
  }


def table(
  pairs: list[dict[str, Any]], quantiles: Mapping[str, Mapping[str, float]]
) -> str:
  """Returns the first pairs and the quantiles as text."""
  lines = [f"{'cosine':>7}  {'identity':<24} {'other':<24} {'images':>11}  name"]
  for pair in pairs[:_PRINTED]:
    images = f"{pair['images']} / {pair['other_images']}"
    name = str(pair["name"] or "") + (" (same name)" if pair["same_name"] else "")
    lines.append(
      f"{pair['cosine']:7.4f}  {pair['identity']:<24} {pair['other']:<24} "
      f"{images:>11}  {name}".rstrip()
    )
  if len(pairs) > _PRINTED:
    lines.append(f"and {len(pairs) - _PRINTED} pairs more; --report=FILE has all")
  for what, values in quantiles.items():
    shown = "  ".join(f"{share}: {cosine:.3f}" for share, cosine in values.items())
    lines.append(f"quantiles of {what.replace('_', ' ')}:  {shown}")
  return os.linesep.join(lines)


def explain(
  threshold: float,
  *,
  false_match_rate: float | None,
  false_matches: float | None,
  miss_rate: float | None,
) -> str:
  """Returns a line about what the threshold means; see `similarity.Reference`."""
  parts = []
  if false_match_rate is not None:
    parts.append(
      f"{false_match_rate:.2g} of the pairs of different people in --others are above "
      f"it, so about {false_matches:,.0f} pairs are expected to be found by chance"
    )
  if miss_rate is not None:
    parts.append(f"{miss_rate:.1%} of its people are not found by half of their images")
  return f"--threshold={threshold:g}: {'; '.join(parts) or 'not measured'}"


def run() -> None:
  """Runs the command; the console script's entry."""
  config.run_command(main, OverlapConfig)


if __name__ == "__main__":
  run()
