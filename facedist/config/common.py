"""The flags that every command has: how buckets are reached.

They are no part of a command's own configuration, so that a run may go on with others.
Their values go to the environment, where `facedist.storage` and the processes that the
command starts find them; a variable set there beforehand is the default.
"""

import dataclasses
import os

from absl import flags

from facedist import environment
from facedist.config.fields import setting
from facedist.config.parsing import from_flags


@dataclasses.dataclass(frozen=True)
class CommonConfig:
  """How every gs:// path is reached."""

  storage_endpoint: str | None = setting(
    None,
    heading="Buckets (any path may be gs://BUCKET/NAME)",
    help="Address of the storage service, if not Google's public one; no credentials "
    "are sent to an http:// address.",
  )
  storage_user_project: str | None = setting(
    None, help="Project that pays for requests to a requester-pays bucket."
  )
  storage_deadline_seconds: float = setting(
    environment.DEFAULT_STORAGE_DEADLINE_SECONDS,
    at_least=1,
    help="How long a failing request to a bucket is tried again, in seconds.",
  )


_VARIABLES = {
  "storage_endpoint": environment.STORAGE_ENDPOINT,
  "storage_user_project": environment.STORAGE_USER_PROJECT,
  "storage_deadline_seconds": environment.STORAGE_DEADLINE_SECONDS,
}


def export(flag_values: flags.FlagValues) -> None:
  """Writes the common flags that were given to the environment.

  Raises:
    errors.UsageError: A value breaks its rule.
  """
  from_flags(CommonConfig, flag_values)
  for name, variable in _VARIABLES.items():
    if flag_values[name].present:
      os.environ[variable] = str(flag_values[name].value)
