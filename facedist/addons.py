"""The one importer of tensorflow_addons, for what TensorFlow itself lacks.

Version 0.23 is its last and runs with TensorFlow 2.15 only, so nothing that a run
always needs may come from here: the rest of the project can move on without it.
"""

import dataclasses
import operator
import types
import warnings
from typing import Any

from facedist import errors


@dataclasses.dataclass(frozen=True)
class Feature:
  """Something that tensorflow_addons has and TensorFlow has not.

  Attributes:
    path: Where it is in the module.
    wanted: What the user asks for it with.
    instead: What the user can ask for that does without it.
  """

  path: str
  wanted: str
  instead: str


FEATURES: dict[str, Feature] = {
  "lamb": Feature("optimizers.LAMB", "--optimizer=lamb", "--optimizer=adamw"),
  "triplet_semihard": Feature(
    "losses.triplet_semihard_loss", "--metric_loss=triplet_semihard", "a --head alone"
  ),
  "triplet_hard": Feature(
    "losses.triplet_hard_loss", "--metric_loss=triplet_hard", "a --head alone"
  ),
}
"""All that is taken from it, by the name that its user has for it."""


def get(name: str) -> Any:
  """Returns a class or function by its key in `FEATURES`, imported when asked for.

  Raises:
    errors.UsageError: tensorflow_addons is not installed or does not run with this
      TensorFlow.
  """
  feature = FEATURES[name]
  return operator.attrgetter(feature.path)(_load(feature))


def _load(feature: Feature) -> types.ModuleType:
  """Imports tensorflow_addons for a feature; UsageError if that is not possible.

  Its import tells every user that its development has ended; that is not shown.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      import tensorflow_addons
  except ImportError as error:
    raise errors.UsageError(
      f"{feature.wanted} needs tensorflow_addons, which cannot be imported ({error}); "
      "install tensorflow-addons==0.23.0 with tensorflow==2.15.1, or take "
      f"{feature.instead}."
    ) from error
  return tensorflow_addons
