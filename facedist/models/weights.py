"""Starting weights of a network: ImageNet's, Keras files, and PyTorch's IResNets."""

import contextlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator

import h5py
import numpy as np
import tensorflow as tf
from absl import logging

from facedist import errors, storage
from facedist.models import torch_weights
from facedist.models.network import FaceNetwork
from facedist.models.torch_weights import not_finite

_RESNET50_FILE = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
_KERAS_WEIGHTS = "model.weights.h5"  # a member of a .keras file
_KERAS_LAYERS = "layers"  # a model's group of a .weights.h5 file


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
      .h5 and .keras the weights of this backbone in Keras 2 or 3, .pt, .pth, .ckpt and
      .safetensors the state dict of an IResNet of arcface_torch. In .keras and
      .weights.h5 layers may follow the backbone's, and are left, and the backbone may
      be a layer of another model; in .h5 neither.

  Raises:
    errors.UsageError: The weights do not exist for this backbone, cannot be
      downloaded, do not fit it, are damaged or not finite.
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


def check_finite(variables: Iterable[tf.Variable], source: str) -> None:
  """Raises UsageError that names the first weight with a NaN or an infinity in it."""
  strategy = tf.distribute.get_strategy()
  for variable in variables:
    # A copy that is here: to read an average of batch norm asks all workers.
    local = strategy.experimental_local_results(variable)[0]
    if not np.isfinite(local.numpy()).all():
      raise not_finite(variable.name.split(":")[0], source)


def _keras(network: FaceNetwork, path: str, source: str) -> None:
  """Reads Keras' weights of the backbone, from a file of weights or a whole model."""
  backbone = network.backbone
  try:
    _load_keras(backbone, path)
  except Exception as error:  # h5py, zipfile and Keras have errors of their own
    if kind := storage.kind_of_file(path):
      raise errors.UsageError(f"--backbone_weights={source} is {kind}.") from error
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    is_whole = type(error) is ValueError  # Keras compared names and shapes
    state = "does not fit" if is_whole else "is damaged or does not fit"
    fix = "give" if is_whole else "copy it again, or give"
    raise errors.UsageError(
      f"--backbone_weights={source}{_note_of_keras_3(path)} {state} "
      f"--backbone={backbone.name}: {reason.rstrip('.')}; {fix} the .h5 or .keras file "
      "of this backbone without its classifier."
    ) from error
  check_finite(backbone.weights, source)


def _load_keras(backbone: tf.keras.Model, path: str) -> None:
  """Loads a file of Keras 2 or 3, whose weights lie alike.

  Where the backbone is a layer of the model in the file, its part alone is loaded.

  Raises:
    Exception: Of any kind; the file is damaged or of another network.
  """
  try:
    backbone.load_weights(path)
  except ValueError as error:
    with tempfile.TemporaryDirectory(prefix="facedist-") as folder:
      for name, part in _nested_models(path, folder):
        with contextlib.suppress(ValueError):
          backbone.load_weights(part)
          logging.info("the backbone is %s of %s", name, path)
          return
    raise error


def _nested_models(path: str, folder: str) -> Iterator[tuple[str, str]]:
  """Yields the models that are layers of the one in a file, each as a file in `folder`.

  Args:
    path: A .keras or .weights.h5 file; others have none.
    folder: A local folder.
  """
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      path = archive.extract(_KERAS_WEIGHTS, folder)
  if not path.endswith(".weights.h5"):
    return
  with h5py.File(path) as whole:
    names: list[str] = []
    whole.visit(names.append)
    for name in names:
      if name.endswith(f"/{_KERAS_LAYERS}"):
        model = name.removesuffix(f"/{_KERAS_LAYERS}")
        part = os.path.join(folder, "part.weights.h5")
        with h5py.File(part, "w") as copy:
          for member in whole[model]:
            whole.copy(f"{model}/{member}", copy, member)
        yield model, part


def _note_of_keras_3(path: str) -> str:
  """Returns ` (of Keras 3.5.0)`; nothing where a file is of Keras 2 or does not say."""
  try:
    if zipfile.is_zipfile(path):
      with zipfile.ZipFile(path) as archive:
        version = json.loads(archive.read("metadata.json"))["keras_version"]
    else:
      with h5py.File(path) as content:
        version = content.attrs["keras_version"]
    return "" if version.startswith("2.") else f" (of Keras {version})"
  except Exception:  # the file is damaged, or of no known kind
    return ""


def _torch(network: FaceNetwork, path: str, source: str) -> None:
  """Reads a state dict of arcface_torch."""
  values = torch_weights.read(path, source)
  torch_weights.assign(network.backbone, network.embedding, values, source)


_READERS: dict[str, Callable[[FaceNetwork, str, str], None]] = {
  ".h5": _keras,
  ".keras": _keras,
  ".pt": _torch,
  ".pth": _torch,
  ".ckpt": _torch,
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
