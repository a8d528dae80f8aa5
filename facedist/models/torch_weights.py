"""The state dict of an arcface_torch IResNet, as the weights of ours.

Names there are ours with `.` for `_` (`layer1.0.conv1.weight`); kernels are
[out, in, height, width] instead of [height, width, in, out], and the linear layer of
output E reads the map as [channels, height, width], not [height, width, channels].
"""

import importlib.util
from collections.abc import Collection, Mapping, Set

import numpy as np
import tensorflow as tf
from absl import logging

from facedist import errors, storage
from facedist.models import iresnet

State = Mapping[str, np.ndarray]
"""A PyTorch state dict: float32 arrays by name."""

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

_TRANSPARENT = ("module", "_orig_mod")  # may stand anywhere in a name
_WRAPPERS = (*_TRANSPARENT, "model", "backbone", "net")
_ANCHOR = "layer1.0.conv1.weight"
"""A tensor that every IResNet has."""
_STATE_DICTS = ("state_dict", "state_dict_backbone", "model_state_dict", "model")
"""Where Lightning, arcface_torch and others have it in a training checkpoint."""
_SHOWN = 4  # names in a line of the log


def check(backbone: str, source: str) -> None:
  """Raises UsageError for a backbone that has no weights there, or no reader here."""
  if backbone not in iresnet.UNITS:
    raise errors.UsageError(
      f"--backbone_weights={source}: PyTorch's weights are taken for "
      f"{', '.join(iresnet.UNITS)}, not for --backbone={backbone}; take one of them or "
      "other weights."
    )
  library = _library(source)
  if importlib.util.find_spec(library) is None:
    raise errors.UsageError(
      f"--backbone_weights={source} is read by {library}, which is not installed; "
      f"pip install {library}."
    )


def _library(source: str) -> str:
  """Returns what reads a file of this name."""
  return "safetensors" if source.endswith(".safetensors") else "torch"


def read(path: str, source: str) -> State:
  """Reads a .safetensors file, or one that torch.save wrote, without running its code.

  Of a training checkpoint it takes the network's state dict.

  Args:
    path: A local file.
    source: What the user called it.

  Raises:
    errors.UsageError: The library that reads it is not installed, or it is no state
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
  except Exception as error:  # each library has errors of its own, RuntimeError above
    if kind := storage.kind_of_file(path):
      raise errors.UsageError(f"--backbone_weights={source} is {kind}.") from error
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise errors.UsageError(
      f"--backbone_weights={source} is no state dict ({reason}); give the file that "
      f"{library} saved of a model's state_dict()."
    ) from error
  return {
    name: value
    for name, value in found.items()
    if not name.endswith("num_batches_tracked")
  }


def assign(
  backbone: tf.keras.Model, embedding: tf.keras.Model, state: State, source: str
) -> None:
  """Sets the backbone's weights, and the embedding layer's where all of them fit.

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
  odd = [f"it lacks {key}" for key in sorted(targets.keys() - inner)]
  odd += [f"it also has {key}" for key in sorted(inner - targets.keys())]
  values = {} if odd else {key: _converted(state[key]) for key in targets}
  odd += _misfits(targets, values)
  if odd:
    raise errors.UsageError(
      f"--backbone_weights={source} does not fit --backbone={backbone.name}: {odd[0]}; "
      "name the IResNet that it was saved of."
    )
  _set(targets, values)
  _assign_embedding(embedding, state, source, map_shape=backbone.output_shape[1:])


def not_finite(name: str, source: str) -> errors.UsageError:
  """Returns the error of weights with a NaN or an infinity in them."""
  return errors.UsageError(
    f"--backbone_weights={source}: {name} has values that are not finite; give weights "
    "that were saved before that training went wrong."
  )


def _network(state: State, source: str) -> State:
  """Returns the network's own tensors, by their names without what wrapped it.

  DistributedDataParallel, torch.compile and Lightning put the names of their own
  modules before the network's, each inside another in any order.

  Raises:
    errors.UsageError: Other names stand before it, or there are several networks.
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
  """Leaves out the weights of heads: a matrix, and vectors, in a module of their own.

  Args:
    state: The network's tensors, and a head's beside them.
    own: The network's modules.
    source: What the user called the file.
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
  """Says which tensors of the file are not the network's."""
  if keys:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    named = ", ".join(sorted(keys)[:_SHOWN])
    logging.info("%s: ignored beside the network: %s%s", source, named, more)


def _assign_embedding(
  embedding: tf.keras.Model,
  state: State,
  source: str,
  *,
  map_shape: tuple[int, int, int],
) -> None:
  """Sets the weights of output E if all are there and have its shapes; logs which."""
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
    "%s: backbone taken; embedding layer %s",
    source,
    "taken too" if fits else "of another shape, so it starts at random",
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
  """Lists the values whose shape is another, dimensions of size 1 aside."""
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
