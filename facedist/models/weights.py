"""Starting weights of a network: ImageNet's, Keras files, and PyTorch's IResNets."""

import os
from collections.abc import Callable

import tensorflow as tf

from facedist import errors, storage
from facedist.models import torch_weights
from facedist.models.network import FaceNetwork

_RESNET50_FILE = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"


def load(network: FaceNetwork, source: str) -> None:
  """Sets the backbone's weights, and the embedding layer's where the file has them.

  Args:
    network: What `network.build_network` returned.
    source: imagenet, none, or a file, local or gs://, whose ending says what it holds:
      .h5 and .keras the weights of this backbone in Keras, .pt, .pth and
      .safetensors the state dict of an IResNet of arcface_torch.

  Raises:
    errors.UsageError: The weights do not exist for this backbone, cannot be
      downloaded, or do not fit it.
  """
  if source == "none":
    return
  if source == "imagenet":
    network.backbone.set_weights(_imagenet(network.backbone.name).get_weights())
    return
  if not storage.is_bucket(source) and not os.path.isfile(source):
    raise errors.UsageError(
      f"--backbone_weights={source} is no file; give imagenet, none, a run's workdir "
      f"or a FILE that ends in {', '.join(_READERS)}."
    )
  ending = os.path.splitext(source)[1]
  if ending not in _READERS:
    raise errors.UsageError(
      f"--backbone_weights={source} does not say by its ending what it holds; give a "
      f"FILE that ends in {', '.join(_READERS)}."
    )
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


def _imagenet(name: str) -> tf.keras.Model:
  """Returns Keras' own model with ImageNet weights, downloaded on first use."""
  if name != "resnet50":
    raise errors.UsageError(
      f"--backbone_weights=imagenet: there are none for --backbone={name}; "
      "use --backbone_weights=none."
    )
  try:
    return tf.keras.applications.ResNet50(include_top=False, weights="imagenet")
  except Exception as error:  # Keras raises a bare Exception when a download fails
    raise errors.UsageError(
      "--backbone_weights=imagenet could not be downloaded; bring Keras' file "
      f"{_RESNET50_FILE} to this machine and name it with --backbone_weights=FILE, or "
      "start from random weights with --backbone_weights=none."
    ) from error
