"""From images to embeddings in batches of one size, and into an embeddings file."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import cv2
import numpy as np
from absl import logging

from facedist import errors, progress
from facedist.data import image_source
from facedist.evaluation.embeddings_file import EmbeddingsWriter

Batch = tuple[np.ndarray, Sequence[str]]
"""uint8[n, S, S, 3] RGB images, and what to call each in an error."""


class Stopwatch:
  """Adds up the time of `with` blocks, in `seconds`."""

  def __init__(self) -> None:
    self.seconds = 0.0
    self._started = 0.0

  def __enter__(self) -> None:
    self._started = time.perf_counter()

  def __exit__(self, *error: object) -> None:
    self.seconds += time.perf_counter() - self._started


@dataclasses.dataclass(frozen=True)
class Embedder:
  """Runs a network over images as papers do when they verify faces.

  With `mirror`, an image's embedding is the sum of its own and of its mirror image's
  raw embedding, normalised after the sum: the practice of ArcFace's public code
  (insightface, recognition/arcface_torch/eval/verification.py).

  Attributes:
    network: Takes uint8[batch_size, S, S, 3] and returns raw, finite
      float32[batch_size, embedding]. It always gets the full batch, so it is traced
      for one shape only.
    network_name: What to call the network in an error.
    batch_size: Images that one call of the network takes.
    mirror: Whether to add the mirror image's embedding.
    normalize: Whether embeddings leave with length 1 (L2).
    forward_time: Has the time that the network took.
  """

  network: Callable[[np.ndarray], Any]
  network_name: str
  batch_size: int
  mirror: bool = True
  normalize: bool = True
  forward_time: Stopwatch = dataclasses.field(default_factory=Stopwatch)

  def embed(self, images: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Embeds a batch.

    Args:
      images: uint8[n, S, S, 3] RGB, n up to `batch_size`.
      names: What to call each image in an error.

    Returns:
      float32[n, embedding].

    Raises:
      errors.DataError: An embedding is zero or not finite.
    """
    return self._embed(self._views(images), names)

  def stream(self, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
    """Yields the embeddings of each batch; the next is read while one is embedded.

    Args:
      batches: Images and their names, up to `batch_size` at a time.

    Yields:
      float32[n, embedding] for each batch of n images.
    """
    ahead = read_ahead((self._views(images), names) for images, names in batches)
    for views, names in ahead:
      yield self._embed(views, names)

  def _views(self, images: np.ndarray) -> list[np.ndarray]:
    """Returns the inputs of the network for a batch: itself, and its mirror image."""
    count = len(images)
    if images.dtype != np.uint8 or not 0 < count <= self.batch_size:
      raise ValueError(f"{images.dtype}[{count}] images, not up to {self.batch_size}")
    padding = [(0, self.batch_size - count), (0, 0), (0, 0), (0, 0)]
    full = np.pad(images, padding) if count < self.batch_size else images
    return [full, mirror_images(full)] if self.mirror else [full]

  def _embed(self, views: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Returns the embeddings of the images of these names, from `_views`."""
    with self.forward_time:
      parts = [self.network(view) for view in views]  # a GPU is at the first meanwhile
      arrays = [np.asarray(part, np.float32) for part in parts]
    embeddings = np.sum([array[: len(names)] for array in arrays], axis=0)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    self._check(lengths[:, 0], names)
    return embeddings / lengths if self.normalize else embeddings

  def _check(self, lengths: np.ndarray, names: Sequence[str]) -> None:
    """Raises DataError for an embedding that has no direction."""
    broken = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(broken):
      kind = "zero" if lengths[broken[0]] == 0 else "not finite"
      raise errors.DataError(
        f"{self.network_name} embeds {names[broken[0]]} as a vector that is {kind} "
        f"({len(broken)} of {len(lengths)} in this batch); the weights are broken: use "
        "an earlier checkpoint."
      )


def mirror_images(images: np.ndarray) -> np.ndarray:
  """Returns uint8[n, S, S, 3] images with left and right exchanged.

  Image by image, since NumPy takes more than ten times as long to reverse pixels.
  """
  mirrored = np.empty_like(images)
  for image, target in zip(images, mirrored, strict=True):
    cv2.flip(image, 1, dst=target)
  return mirrored


def read_ahead(batches: Iterable[Any]) -> Iterator[Any]:
  """Yields the same items, getting the next one while the caller works on one."""
  iterator = iter(batches)
  end = object()
  with futures.ThreadPoolExecutor(1) as reader:
    pending = reader.submit(next, iterator, end)
    while (item := pending.result()) is not end:
      pending = reader.submit(next, iterator, end)
      yield item


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
