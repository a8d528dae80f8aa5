"""The one importer of tensorflow_addons, for what TensorFlow itself lacks.

Version 0.23 is its last and runs with TensorFlow 2.15 only, so nothing that a run
always needs may come from here: the rest of the project can move on without it.
"""

import types
import warnings

from facedist import errors


def load() -> types.ModuleType:
  """Returns the module tensorflow_addons, imported when it is first asked for.

  Its import tells every user that its development has ended; that is not shown.

  Raises:
    errors.UsageError: It is not installed or does not run with this TensorFlow.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      import tensorflow_addons
  except ImportError as error:
    raise errors.UsageError(
      f"tensorflow_addons cannot be imported ({error}); install "
      "tensorflow-addons==0.23.0 with tensorflow==2.15.1, or choose an option that "
      "does without it."
    ) from error
  return tensorflow_addons
