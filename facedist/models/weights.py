"""Starting weights of a network: ImageNet's, Keras files, and PyTorch's IResNets."""

import os
from collections.abc import Callable

import tensorflow as tf

from facedist import errors, storage
from facedist.models import torch_weights
from facedist.models.network import FaceNetwork

_RESNET50_FILE = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"


def check(backbone: str, source: str) -> None:
  """Finds what can be told to be wrong without a network.

  Args:
    backbone: Its name.
    source: As `load` takes it.

  Raises:
    errors.UsageError: There are no such weights for this backbone, the file is not
      there, its ending says nothing, or what reads it is not installed.
  """
  if source == "none":
    return
  if source == "imagenet":
    if backbone != "resnet50":
      raise errors.UsageError(
        f"--backbone_weights=imagenet: there are none for --backbone={backbone}; "
        "use --backbone_weights=none."
      )
    return
  is_bucket = storage.is_bucket(source)
  if not (storage.exists(source) if is_bucket else os.path.isfile(source)):
    raise errors.UsageError(
      f"--backbone_weights={source} is no file; give imagenet, none, a run's workdir "
      f"or a FILE that ends in {', '.join(_READERS)}."
    )
  reader = _READERS.get(os.path.splitext(source)[1])
  if reader is None:
    raise errors.UsageError(
      f"--backbone_weights={source} does not say by its ending what it holds; give a "
      f"FILE that ends in {', '.join(_READERS)}."
    )
  if reader is _torch:
    torch_weights.check(backbone, source)


def load(network: FaceNetwork, source: str) -> None:
  """Sets the backbone's weights, and the embedding layer's where the file has them.

  Args:
    network: What `network.build_network` returned.
    source: imagenet, none, or a file, local or gs://, whose ending says what it holds:
      .h5 and .keras the weights of this backbone in Keras, .pt, .pth and
      .safetensors the state dict of an IResNet of arcface_torch. In .keras and
      .weights.h5 layers may follow the backbone's, and are left; in .h5 none may.

  Raises:
    errors.UsageError: The weights do not exist for this backbone, cannot be
      downloaded, or do not fit it.
  """
  check(network.backbone.name, source)
  if source == "none":
    return
  if source == "imagenet":
    network.backbone.set_weights(_imagenet().get_weights())
    return
  ending = os.path.splitext(source)[1]
  with storage.local_copy(source) as path:
    _READERS[ending](network, path, source)


def _keras(network: FaceNetwork, path: str, source: str) -> None:
  """Reads Keras' weights of the backbone, from a file of weights or a whole model."""
  backbone = network.backbone
  try:
    backbone.load_weights(path)
  except (ValueError, OSError, KeyError) as error:
    reason = str(error).strip().splitlines()[0]
    raise errors.UsageError(
      f"--backbone_weights={source} does not fit --backbone={backbone.name}: {reason} "
      "Give the .h5 or .keras file of this backbone without its classifier."
    ) from error


def _torch(network: FaceNetwork, path: str, source: str) -> None:
  """Reads a state dict of arcface_torch."""
  values = torch_weights.read(path, source)
  torch_weights.assign(network.backbone, network.embedding, values, source)


_READERS: dict[str, Callable[[FaceNetwork, str, str], None]] = {
  ".h5": _keras,
  ".keras": _keras,
  ".pt": _torch,
  ".pth": _torch,
  ".safetensors": _torch,
}


def _imagenet() -> tf.keras.Model:
  """Returns Keras' own ResNet50 with ImageNet weights, downloaded on first use."""
  try:
    return tf.keras.applications.ResNet50(include_top=False, weights="imagenet")
  except Exception as error:  # Keras raises a bare Exception when a download fails
    raise errors.UsageError(
      "--backbone_weights=imagenet could not be downloaded; bring Keras' file "
      f"{_RESNET50_FILE} to this machine and name it with --backbone_weights=FILE, or "
      "start from random weights with --backbone_weights=none."
    ) from error
