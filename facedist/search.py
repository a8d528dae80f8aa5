"""Searches faces in a gallery: which of its images are most like each query.

Embed both with one checkpoint and the same flags, then search:

  python -m facedist.embed --workdir=/runs/a --input=/data/people --output=people.npz
  python -m facedist.embed --workdir=/runs/a --input=/data/new --output=new.npz
  python -m facedist.search --gallery=people.npz --query=new.npz --num_matches=5

It prints a line for each match, best first, with tabs between query, rank, cosine, path
and identity in the gallery (empty where it is not known):

  cam1/7.jpg  1  0.6132  ada/3.jpg  ada
  cam1/7.jpg  2  0.5871  ada/1.jpg  ada

  --json               prints JSON Lines instead, an object for each query: query, and
                       matches, a list of path, identity and cosine
  --backend=faiss      searches with faiss (pip install 'facedist[faiss]'), which is
                       exact too and uses all cores; the default takes it above a
                       million images, where it is installed
  --min_cosine=0.3     leaves out matches below, such as below a threshold that
                       facedist.evaluate found

Files may have any format of facedist.embed. The search is exact: every query is
compared with every image, block by block; of equal cosines the first of the gallery
comes first. Memory is that of the two files' embeddings, 4 bytes times embedding_size
for each image, and less than 200 MB.
"""

import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator

from absl import logging

from facedist import config, errors
from facedist.config import setting
from facedist.evaluation import embeddings_file, search


@dataclasses.dataclass(frozen=True)
class SearchConfig:
  """What is searched where, and how many matches are printed."""

  gallery: str = setting(
    help="File of facedist.embed with the images that are searched.", path=True
  )
  query: str = setting(
    help="File of facedist.embed with the images to search for.", path=True
  )
  num_matches: int = setting(
    10, help="Largest number of matches of a query.", at_least=1, at_most=10_000
  )
  min_cosine: float = setting(
    -1.0, help="Lowest cosine of a match.", at_least=-1.0, at_most=1.0
  )
  backend: str = setting(
    "auto",
    help="What compares the embeddings. Both are exact; auto is numpy, and faiss above "
    "a million images if it is installed.",
    choices=search.BACKENDS,
  )
  json: bool = setting(False, help="Whether to print JSON Lines.")


def main(settings: SearchConfig) -> int:
  """Reads both files and prints the matches of query after query.

  Raises:
    errors.DataError: A file is not of facedist.embed, or two networks made them.
    errors.UsageError: --backend=faiss, and faiss is not installed.
  """
  if settings.backend == "faiss":
    search.import_faiss()
  gallery = embeddings_file.load_embeddings(settings.gallery)
  queries = embeddings_file.load_embeddings(settings.query)
  embeddings_file.check_one_network(
    {settings.query: queries, settings.gallery: gallery}
  )
  started = time.monotonic()
  find = _backend_for(settings.backend, num_images=len(gallery.paths))
  found = find(queries.embeddings, gallery.embeddings, num_matches=settings.num_matches)
  try:
    for query, matches in zip(queries.paths, found, strict=True):
      print_matches(settings, gallery, query, matches)
    sys.stdout.flush()
  except BrokenPipeError:  # `| head` does this; at exit Python could not flush it
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return errors.ExitCode.DONE
  logging.info(
    "searched %d images for %d queries in %.1f s",
    len(gallery.paths),
    len(queries.paths),
    time.monotonic() - started,
  )
  return errors.ExitCode.DONE


def _backend_for(
  name: str, *, num_images: int
) -> Callable[..., Iterator[search.Matches]]:
  """Returns the function that searches a gallery of that size."""
  is_large = num_images > search.LARGE_GALLERY
  if name == "auto" and is_large and importlib.util.find_spec("faiss") is None:
    logging.info("faiss may search faster: pip install 'facedist[faiss]'")
    is_large = False
  with_faiss = name == "faiss" or (name == "auto" and is_large)
  return search.search_with_faiss if with_faiss else search.search


def print_matches(
  settings: SearchConfig,
  gallery: embeddings_file.EmbeddingsFile,
  query: str,
  matches: search.Matches,
) -> None:
  """Prints the matches of one query that are not below --min_cosine."""
  entries = [
    {
      "path": gallery.paths[place],
      "identity": gallery.identities[place],
      "cosine": round(float(cosine), 6),
    }
    for place, cosine in zip(matches.places, matches.cosines, strict=True)
    if cosine >= settings.min_cosine
  ]
  if settings.json:
    print(json.dumps({"query": query, "matches": entries}))
    return
  for rank, entry in enumerate(entries, 1):
    words = (query, rank, f"{entry['cosine']:.4f}", entry["path"], entry["identity"])
    print(*words, sep="\t")


def run() -> None:
  """Runs the command line."""
  config.run_command(main, SearchConfig)


if __name__ == "__main__":
  run()
