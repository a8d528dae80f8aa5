"""Pretrained weights of a network: ImageNet's, Keras files, and PyTorch's IResNets.

The PyTorch files are state dicts of arcface_torch. Its names are ours with `.` for `_`
(`layer1.0.conv1.weight`). Its kernels are [out, in, height, width] instead of [height,
width, in, out], and its linear layer of output E reads the feature map as [channels,
height, width] instead of [height, width, channels].
"""

import contextlib
import importlib.util
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set

import h5py
import numpy as np
import tensorflow as tf
from absl import logging

from facedist import errors, storage
from facedist.models.backbones import iresnet
from facedist.models.network import FaceNetwork

State = Mapping[str, np.ndarray]
"""A PyTorch state dict: float32 arrays by name."""

_RESNET50_FILE = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
_KERAS_WEIGHTS = "model.weights.h5"  # a member of a .keras file
_KERAS_LAYERS = "layers"  # a model's group of a .weights.h5 file
_OUTPUT = {"map_norm": "bn2", "linear": "fc", "norm": "features"}
"""Names of output E's layers in arcface_torch, by ours."""
_PARTS = {
  "kernel": "weight",
  "bias": "bias",
  "alpha": "weight",
  "gamma": "weight",
  "beta": "bias",
  "moving_mean": "running_mean",
  "moving_variance": "running_var",
}
"""Names of a layer's weights in PyTorch, by Keras'."""
_TRANSPARENT = ("module", "_orig_mod")  # may be anywhere in a name
_WRAPPERS = (*_TRANSPARENT, "model", "backbone", "net")
_ANCHOR = "layer1.0.conv1.weight"
"""A tensor that every IResNet has."""
_STATE_DICTS = ("state_dict", "state_dict_backbone", "model_state_dict", "model")
"""Keys of the state dict in checkpoints of Lightning, arcface_torch and others."""
_MAX_SHOWN = 4  # names in a line of the log


def check_weights_file(backbone: str, source: str) -> None:
  """Checks what can be checked before the network is built.

  Args:
    backbone: Its name.
    source: As `load_weights_file` takes it.

  Raises:
    errors.UsageError: There are no such weights for this backbone, the file is missing
      or of an unknown ending, or the library that reads it is not installed.
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
      f"--backbone_weights={source} is not a file; give imagenet, none, a run's "
      f"workdir or a FILE that ends in {', '.join(_READERS)}."
    )
  reader = _READERS.get(os.path.splitext(source)[1])
  if reader is None:
    raise errors.UsageError(
      f"--backbone_weights={source} has an unknown ending; give a "
      f"FILE that ends in {', '.join(_READERS)}."
    )
  if reader is _torch:
    check_state_dict(backbone, source)


def check_state_dict(backbone: str, source: str) -> None:
  """Raises UsageError for a backbone without PyTorch weights or a missing library."""
  if backbone not in iresnet.UNITS:
    raise errors.UsageError(
      f"--backbone_weights={source}: PyTorch's weights are read for "
      f"{', '.join(iresnet.UNITS)}, not for --backbone={backbone}; choose one of these "
      "or other weights."
    )
  library = _library(source)
  if importlib.util.find_spec(library) is None:
    raise errors.UsageError(
      f"--backbone_weights={source} is read by {library}, which is not installed; "
      f"pip install {library}."
    )


def _library(source: str) -> str:
  """Returns the library that reads a file of this name."""
  return "safetensors" if source.endswith(".safetensors") else "torch"


def load_weights_file(network: FaceNetwork, source: str) -> None:
  """Sets the backbone's weights, and the embedding layer's where the file has them.

  Args:
    network: Result of `network.build_network`.
    source: imagenet, none, or a file, local or gs://. Its ending is its format: .h5 and
      .keras are weights of this backbone in Keras 2 or 3; .pt, .pth, .ckpt and
      .safetensors are the state dict of an IResNet of arcface_torch. In .keras and
      .weights.h5 files, layers after the backbone's are ignored, and the backbone may
      be a layer of another model. In .h5 files neither is possible.

  Raises:
    errors.UsageError: The weights do not exist for this backbone, cannot be
      downloaded, do not fit it, are corrupt or not finite.
  """
  check_weights_file(network.backbone.name, source)
  if source == "none":
    return
  if source == "imagenet":
    network.backbone.set_weights(_imagenet().get_weights())
    return
  ending = os.path.splitext(source)[1]
  with storage.local_copy(source) as path:
    _READERS[ending](network, path, source)


def _imagenet() -> tf.keras.Model:
  """Returns Keras' own ResNet50 with ImageNet weights, downloaded on first use."""
  try:
    return tf.keras.applications.ResNet50(include_top=False, weights="imagenet")
  except Exception as error:  # Keras raises a bare Exception when a download fails
    raise errors.UsageError(
      "--backbone_weights=imagenet could not be downloaded; copy Keras' file "
      f"{_RESNET50_FILE} to this machine and give it as --backbone_weights=FILE, or "
      "start from random weights with --backbone_weights=none."
    ) from error


def check_finite(variables: Iterable[tf.Variable], source: str) -> None:
  """Raises UsageError that names the first weight with a NaN or an infinity in it."""
  strategy = tf.distribute.get_strategy()
  for variable in variables:
    # The local copy: reading an average of batch norm would need all workers.
    local = strategy.experimental_local_results(variable)[0]
    if not np.isfinite(local.numpy()).all():
      raise not_finite(variable.name.split(":")[0], source)


def not_finite(name: str, source: str) -> errors.UsageError:
  """Returns the error for weights that contain a NaN or an infinity."""
  return errors.UsageError(
    f"--backbone_weights={source}: {name} has values that are not finite; give weights "
    "that were saved before that training went wrong."
  )


def _keras(network: FaceNetwork, path: str, source: str) -> None:
  """Reads Keras' weights of the backbone, from a file of weights or a whole model."""
  backbone = network.backbone
  try:
    _load_keras(backbone, path)
  except Exception as error:  # h5py, zipfile and Keras each raise their own errors
    if kind := storage.kind_of_file(path):
      raise errors.UsageError(f"--backbone_weights={source} is {kind}.") from error
    reason = errors.first_line(error)
    is_whole = type(error) is ValueError  # Keras read it and compared names and shapes
    state = "does not fit" if is_whole else "is corrupt or does not fit"
    fix = "give" if is_whole else "copy it again, or give"
    raise errors.UsageError(
      f"--backbone_weights={source}{_note_of_keras_3(path)} {state} "
      f"--backbone={backbone.name}: {reason.rstrip('.')}; {fix} the .h5 or .keras file "
      "of this backbone without its classifier."
    ) from error
  check_finite(backbone.weights, source)


def _load_keras(backbone: tf.keras.Model, path: str) -> None:
  """Loads a file of Keras 2 or 3, which store weights in the same layout.

  If the backbone is a layer of the model in the file, only that layer is loaded.

  Raises:
    Exception: Of any kind; the file is corrupt or of another network.
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
  """Yields each model that is a layer of the model in a file: its name and a file.

  Args:
    path: A .keras or .weights.h5 file; other formats hold none.
    folder: A local folder for the file, which the next model overwrites.
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
  """Returns ` (of Keras 3.5.0)`, or nothing for Keras 2 or an unknown version."""
  try:
    if zipfile.is_zipfile(path):
      with zipfile.ZipFile(path) as archive:
        version = json.loads(archive.read("metadata.json"))["keras_version"]
    else:
      with h5py.File(path) as content:
        version = content.attrs["keras_version"]
    return "" if version.startswith("2.") else f" (of Keras {version})"
  except Exception:  # the file is corrupt, or of an unknown format
    return ""


def _torch(network: FaceNetwork, path: str, source: str) -> None:
  """Reads a state dict of arcface_torch."""
  values = read_state_dict(path, source)
  assign_state_dict(network.backbone, network.embedding, values, source)


def read_state_dict(path: str, source: str) -> State:
  """Reads a .safetensors or torch.save file, without running code from it.

  Of a training checkpoint it reads the network's state dict.

  Args:
    path: A local file.
    source: The value of --backbone_weights.

  Raises:
    errors.UsageError: The library that reads it is not installed, or it is not a state
      dict.
  """
  library = _library(source)
  try:
    found = _read_safetensors(path) if library == "safetensors" else _read_torch(path)
  except ImportError as error:
    raise errors.UsageError(
      f"--backbone_weights={source} is read by {library}, which cannot be imported "
      f"({error}); pip install {library}."
    ) from error
  except Exception as error:  # each library raises its own errors
    if kind := storage.kind_of_file(path):
      raise errors.UsageError(f"--backbone_weights={source} is {kind}.") from error
    reason = errors.first_line(error)
    raise errors.UsageError(
      f"--backbone_weights={source} is not a state dict ({reason}); give the file that "
      f"{library} saved from a model's state_dict()."
    ) from error
  return {
    name: value
    for name, value in found.items()
    if not name.endswith("num_batches_tracked")
  }


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
  """Reads a .safetensors file."""
  from safetensors import numpy as safetensors

  return {
    name: np.asarray(value) for name, value in safetensors.load_file(path).items()
  }


def _read_torch(path: str) -> dict[str, np.ndarray]:
  """Reads a file of torch.save: tensors by name, alone or in a training checkpoint."""
  import torch

  saved = torch.load(path, map_location="cpu", weights_only=True)
  for name in _STATE_DICTS:
    if isinstance(saved.get(name), dict):
      saved = saved[name]
      break
  return {name: value.float().numpy() for name, value in saved.items()}


def assign_state_dict(
  backbone: tf.keras.Model, embedding: tf.keras.Model, state: State, source: str
) -> None:
  """Sets the backbone's weights, and the embedding layer's if all of them fit.

  Raises:
    errors.UsageError: The state dict is of another network, or not finite.
  """
  targets = {
    key: weight
    for layer in backbone.layers
    for key, weight in _keys(layer, layer.name.replace("_", "."))
  }
  own = {key.split(".")[0] for key in targets} | set(_OUTPUT.values())
  state = _without_heads(_network(state, source), own, source)
  for key, value in state.items():
    if not np.isfinite(value).all():
      raise not_finite(key, source)
  inner = {key for key in state if key.split(".")[0] not in _OUTPUT.values()}
  problems = [f"it lacks {key}" for key in sorted(targets.keys() - inner)]
  problems += [f"it also has {key}" for key in sorted(inner - targets.keys())]
  values = {} if problems else {key: _converted(state[key]) for key in targets}
  problems += _misfits(targets, values)
  if problems:
    raise errors.UsageError(
      f"--backbone_weights={source} does not fit --backbone={backbone.name}: "
      f"{problems[0]}; give the IResNet that it was saved from."
    )
  _set(targets, values)
  _assign_embedding(embedding, state, source, map_shape=backbone.output_shape[1:])


def _network(state: State, source: str) -> State:
  """Returns the network's own tensors, by their names without wrappers' prefixes.

  DistributedDataParallel, torch.compile and Lightning prefix the network's names with
  those of their own modules, nested in any order.

  Raises:
    errors.UsageError: There is another prefix, or there are several networks.
  """
  by_prefix: dict[str, dict[str, np.ndarray]] = {}
  for key, value in state.items():
    parts = key.split(".")
    inside = next(n for n, part in enumerate([*parts, ""]) if part not in _WRAPPERS)
    rest = [part for part in parts[inside:] if part not in _TRANSPARENT]
    prefix = "".join(f"{part}." for part in parts[:inside])
    by_prefix.setdefault(prefix, {})[".".join(rest)] = value
  found = [prefix for prefix, tensors in by_prefix.items() if _ANCHOR in tensors]
  others = {
    key.removesuffix(_ANCHOR) for key in state if key.endswith(f".{_ANCHOR}")
  } - set(by_prefix)
  if len(found) > 1 or (others and not found):
    held = " and ".join(repr(prefix) for prefix in sorted([*found, *others]))
    raise errors.UsageError(
      f"--backbone_weights={source} has networks under the names {held}; save the "
      f"state_dict() of one of them (only {', '.join(_WRAPPERS)} before it are known)."
    )
  if not found:
    return state
  network = by_prefix.pop(found[0])
  others = {prefix + key for prefix, tensors in by_prefix.items() for key in tensors}
  _log_ignored(others, source)
  return network


def _without_heads(state: State, own: Set[str], source: str) -> State:
  """Drops the weights of heads: modules of one matrix, and perhaps vectors.

  Args:
    state: The tensors of the network and perhaps of a head.
    own: The network's modules.
    source: The value of --backbone_weights.
  """
  modules: dict[str, list[str]] = {}
  for key in state:
    modules.setdefault(key.split(".")[0], []).append(key)
  size = state["features.weight"].shape if "features.weight" in state else ()
  heads = []
  for module in modules.keys() - own:
    shapes = [state[key].shape for key in modules[module]]
    matrices = [shape for shape in shapes if len(shape) == 2]  # [classes, embedding]
    if max(map(len, shapes)) == 2 and len(matrices) == 1 and {*size} <= {*matrices[0]}:
      heads += modules[module]
  _log_ignored(heads, source)
  return {key: value for key, value in state.items() if key not in heads}


def _log_ignored(keys: Collection[str], source: str) -> None:
  """Logs which tensors of the file are not the network's."""
  if keys:
    more = f" and {len(keys) - _MAX_SHOWN} more" if len(keys) > _MAX_SHOWN else ""
    named = ", ".join(sorted(keys)[:_MAX_SHOWN])
    logging.info("%s: ignored beside the network: %s%s", source, named, more)


def _assign_embedding(
  embedding: tf.keras.Model,
  state: State,
  source: str,
  *,
  map_shape: tuple[int, int, int],
) -> None:
  """Sets the weights of output E if all are there and fit; logs whether they are."""
  targets = {
    key: weight
    for layer in embedding.layers
    for key, weight in _keys(layer, _OUTPUT.get(layer.name, layer.name))
  }
  height, width, channels = map_shape
  values = {key: _converted(state[key]) for key in targets.keys() & state.keys()}
  linear = values.get("fc.weight")
  if linear is not None and linear.shape[-1] == height * width * channels:
    by_place = linear.reshape(-1, channels, height, width).transpose(2, 3, 1, 0)
    values["fc.weight"] = by_place.reshape(height * width * channels, -1)
  fits = values.keys() == targets.keys() and not _misfits(targets, values)
  if fits:
    _set(targets, values)
  logging.info(
    "%s: restored the backbone; embedding layer %s",
    source,
    "restored too" if fits else "has another shape and starts at random",
  )


def _keys(layer: tf.keras.layers.Layer, name: str) -> list[tuple[str, tf.Variable]]:
  """Returns the weights of a layer by their names in PyTorch."""
  parts = [weight.name.split(":")[0].rsplit("/", 1)[-1] for weight in layer.weights]
  return [
    (f"{name}.{_PARTS[part]}", weight)
    for part, weight in zip(parts, layer.weights, strict=True)
  ]


def _converted(value: np.ndarray) -> np.ndarray:
  """Returns a convolution's kernel in Keras' order, anything else as it is."""
  return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value


def _misfits(targets: Mapping[str, tf.Variable], values: State) -> list[str]:
  """Lists the values of a wrong shape; dimensions of size 1 do not count."""
  found = []
  for key, value in values.items():
    shape = tuple(targets[key].shape)
    if [size for size in shape if size > 1] != [
      size for size in value.shape if size > 1
    ]:
      found.append(f"{key} is {list(value.shape)} where {list(shape)} is wanted")
  return found


def _set(targets: Mapping[str, tf.Variable], values: State) -> None:
  """Assigns each value to the variable of its key."""
  for key, value in values.items():
    targets[key].assign(value.reshape(targets[key].shape))


_READERS: dict[str, Callable[[FaceNetwork, str, str], None]] = {
  ".h5": _keras,
  ".keras": _keras,
  ".pt": _torch,
  ".pth": _torch,
  ".ckpt": _torch,
  ".safetensors": _torch,
}
