"""How buckets are reached: the endpoint, who pays, and how long to keep trying."""

import dataclasses
import math
import os

from facedist import environment, errors

_READ_SECONDS = 30.0  # without a byte; a healthy bucket answers in well under one


@dataclasses.dataclass(frozen=True)
class Settings:
  """What this process and its children use for every gs:// path.

  Attributes:
    endpoint: Where requests go; none means Google's own.
    user_project: The project that pays for requests to a requester-pays bucket.
    deadline_seconds: How long one request is tried again before it is an error.
  """

  endpoint: str | None
  user_project: str | None
  deadline_seconds: float

  def timeout_seconds(self, left: float) -> tuple[float, float]:
    """Returns how long to wait for a connection and for the next byte of an answer.

    Args:
      left: Seconds until the deadline. No wait takes more than a quarter of the
        whole, so that a server which fell silent is always asked again.
    """
    wait = max(0.05, min(_READ_SECONDS, self.deadline_seconds / 4, left))
    return min(wait, 10.0), wait


def configure(
  *,
  endpoint: str | None = None,
  user_project: str | None = None,
  deadline_seconds: float | None = None,
) -> None:
  """Sets what is given, for this process and the children it will start.

  Raises:
    errors.UsageError: A value breaks its rule; nothing was set.
  """
  given = {
    environment.STORAGE_ENDPOINT: endpoint,
    environment.STORAGE_USER_PROJECT: user_project,
    environment.STORAGE_DEADLINE_SECONDS: deadline_seconds,
  }
  values = {name: str(value) for name, value in given.items() if value is not None}
  _parse({**os.environ, **values})
  os.environ.update(values)


def current() -> Settings:
  """Returns the settings in force.

  Raises:
    errors.UsageError: A variable of the environment breaks its rule.
  """
  return _parse(dict(os.environ))


def _parse(variables: dict[str, str]) -> Settings:
  """Returns the settings that these environment variables hold."""
  # STORAGE_EMULATOR_HOST is the libraries' own variable for a test server.
  endpoint = variables.get(environment.STORAGE_ENDPOINT) or variables.get(
    "STORAGE_EMULATOR_HOST"
  )
  if endpoint and not endpoint.startswith(("http://", "https://")):
    raise errors.UsageError(
      f"--storage_endpoint={endpoint} is no address; write https://HOST or http://HOST."
    )
  default = str(environment.DEFAULT_STORAGE_DEADLINE_SECONDS)
  text = variables.get(environment.STORAGE_DEADLINE_SECONDS) or default
  try:
    deadline = float(text)
  except ValueError:
    deadline = math.nan
  if not 0 < deadline < math.inf:
    raise errors.UsageError(
      f"--storage_deadline_seconds={text} must be a number of seconds above 0."
    )
  return Settings(
    endpoint=endpoint.rstrip("/") if endpoint else None,
    user_project=variables.get(environment.STORAGE_USER_PROJECT) or None,
    deadline_seconds=deadline,
  )
