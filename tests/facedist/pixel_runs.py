"""Runs whose real, linear network embeds an image as sums of its pixels.

The backbone leaves the pixels as they are, so a checkpoint's kernel says what they are
embedded as: float32[pixels and channels, embedding].
"""

import contextlib
import functools
import pathlib
from collections.abc import Iterator
from unittest import mock

import cv2
import numpy as np
import tensorflow as tf

from facedist import config
from facedist.models.backbones import layers, registry
from facedist.models.network import FaceNetwork
from facedist.training import ema, train_state
from facedist.training.checkpoint import checkpoints
from facedist.training.config import TrainConfig

SIZE = 16
EDGES = np.zeros((SIZE, SIZE, 3, 2), np.float32)
"""Embeds an image as the red values of its top left and top right pixels."""
EDGES[0, [0, -1], 0] = np.eye(2)
EDGES = EDGES.reshape(-1, 2)


@contextlib.contextmanager
def backbone() -> Iterator[None]:
  """Makes `--backbone=pixels` known in the body."""
  pixels = registry.Backbone(
    _build, 0.0, pooling="flatten", min_size=1, pixel_normalization="x"
  )
  with mock.patch.dict(registry.BACKBONES, pixels=pixels):
    yield


def start(workdir: pathlib.Path | str, *, embedding_size: int = 2, **flags) -> str:
  """Makes the folder of a run that has saved nothing yet; returns it."""
  pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
  text = config.to_json(_config(embedding_size, **flags))
  (pathlib.Path(workdir) / "config.json").write_text(text)
  return str(workdir)


def save(
  workdir: str,
  *steps: int,
  kernel: np.ndarray = EDGES,
  average: np.ndarray | None = None,
  alignment: str | None = None,
) -> None:
  """Saves checkpoints of a network with this kernel and, if given, its average."""
  size = round((len(kernel) / 3) ** 0.5)
  network = _network(size, kernel.shape[1])
  network.embedding.get_layer("linear").kernel.assign(kernel)
  parts: dict[str, tf.Module] = {"network": network}
  if average is not None:
    parts["average"] = ema.ExponentialMovingAverage([tf.Variable(average)])
  facts = {"image_size": size, "alignment": alignment}
  for step in steps:
    state = tf.train.Checkpoint(**parts)
    checkpoints.save(state, workdir, step=step, is_chief=True, facts=facts)


def write_image(path: pathlib.Path, *, left: int, right: int) -> str:
  """Writes an image whose left and right half have these values."""
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.full((SIZE, SIZE, 3), left, np.uint8)
  pixels[:, SIZE // 2 :] = right
  assert cv2.imwrite(str(path), pixels)
  return str(path)


def _config(embedding_size: int, **flags) -> TrainConfig:
  return TrainConfig(
    backbone="pixels",
    backbone_weights="none",
    embedding_size=embedding_size,
    embedding_batch_norm=False,
    **flags,
  )


@functools.cache
def _network(image_size: int, embedding_size: int) -> FaceNetwork:
  return train_state.network_from_config(_config(embedding_size), image_size)


def _build(image_size: int) -> tf.keras.Model:
  images = layers.pixels(image_size)
  return tf.keras.Model(images, tf.keras.layers.Activation("linear")(images))
