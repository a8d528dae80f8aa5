"""Embeds images into a file: from their loaders to an `EmbeddingsWriter`."""

import os
from collections.abc import Iterable, Iterator

import numpy as np
from absl import logging

from facedist import progress
from facedist.data import image_source
from facedist.evaluation.embedder import Embedder
from facedist.evaluation.embeddings_file import EmbeddingsWriter


def write_images(
  loaders: Iterable[image_source.Loader],
  embedder: Embedder,
  writer: EmbeddingsWriter,
  *,
  total: int,
) -> Iterator[tuple[list[image_source.Face], np.ndarray]]:
  """Embeds images into a file; names and skips those that cannot be read.

  Args:
    loaders: Each reads one image; they run in threads.
    embedder: Has the network and the size of a batch.
    writer: Of the file.
    total: Number of images, for the progress.

  Yields:
    The images of each batch that were read, and their float32[images, embedding].
  """
  loaded = image_source.load_in_order(
    loaders, num_threads=os.cpu_count() or 1, ahead=2 * embedder.batch_size
  )
  batches = image_source.batches(loaded, embedder.batch_size)
  for batch in progress.over(batches, "embedded", total=total, size=len):
    faces = [each for each in batch if isinstance(each, image_source.Face)]
    for each in batch:
      if isinstance(each, image_source.Unreadable):
        logging.warning("skipped %s: %s", each.path, each.reason)
        writer.skip(path=each.path, reason=each.reason)
    embeddings = np.zeros((0, 0), np.float32)
    if faces:
      embeddings = embedder.embed(
        np.stack([face.image for face in faces]), [face.path for face in faces]
      )
    for face, embedding in zip(faces, embeddings, strict=True):
      writer.add(path=face.path, identity=face.identity, embedding=embedding)
    yield faces, embeddings
