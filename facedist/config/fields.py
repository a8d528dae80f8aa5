"""The fields of a configuration: their declaration, their rules, their JSON."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from facedist import errors, storage

LARGEST_INT = 2**31 - 1
"""No flag takes a larger integer: TensorFlow and NumPy count with 32 bits in places."""
LARGEST_FLOAT = 10**9
"""No flag takes a larger number: times and epochs then fit timers and step counters."""

Config = TypeVar("Config")
Value = TypeVar("Value")


def setting(
  default: Any = dataclasses.MISSING,
  *,
  help: str,
  choices: Sequence[str] | None = None,
  at_least: float | None = None,
  at_most: float | None = None,
  may_change: bool = False,
  path: bool = False,
  paths: bool = False,
  on_disk: bool = False,
  heading: str | None = None,
) -> Any:
  """Declares a configuration field that becomes a flag.

  Args:
    default: Value when the flag is not given; none makes the flag required.
    help: One line for `--help`, with units.
    choices: The only values allowed, for a string.
    at_least: Smallest value allowed, for a number.
    at_most: Largest value allowed, for a number; LARGEST_INT or LARGEST_FLOAT if none.
    may_change: Whether a second start in the same workdir may have another value.
    path: Whether it is a path, which `paths.normalise` then puts in its plain form.
    paths: Whether it is one path or several with commas between them.
    on_disk: Whether it is a path that must be on this machine's disk, not gs://.
    heading: What `--help` writes above this field; it holds for those that follow.
  """
  metadata = {
    "help": help,
    "choices": choices,
    "at_least": at_least,
    "at_most": at_most,
    "may_change": may_change,
    "path": path or on_disk,
    "paths": paths,
    "on_disk": on_disk,
    "heading": heading,
  }
  return dataclasses.field(default=default, metadata=metadata)


def lookup(table: Mapping[str, Value], name: str, flag: str) -> Value:
  """Returns `table[name]`; a UsageError that lists the keys if there is none."""
  if name not in table:
    raise errors.UsageError(
      f"--{flag}={name} is not known; choose one of {', '.join(sorted(table))}."
    )
  return table[name]


def validate(config: Any) -> None:
  """Raises UsageError for the first field that breaks its declared rule."""
  for field in dataclasses.fields(config):
    value, rule = getattr(config, field.name), field.metadata
    flag = f"--{field.name}={value}"
    if value is None:
      continue
    if isinstance(value, int | float) and not isinstance(value, bool):
      largest = LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT
      if not -largest <= value <= largest:
        raise errors.UsageError(
          f"{flag} must be a number between {-largest} and {largest}."
        )
    if rule["choices"] is not None and value not in rule["choices"]:
      choices = ", ".join(rule["choices"])
      raise errors.UsageError(f"{flag} is not known; choose one of {choices}.")
    if rule["on_disk"] and storage.is_bucket(value):
      raise errors.UsageError(
        f"{flag} must be on this machine's disk; name a local path."
      )
    if rule["at_least"] is not None and not value >= rule["at_least"]:
      raise errors.UsageError(f"{flag} must be at least {rule['at_least']}.")
    if rule["at_most"] is not None and not value <= rule["at_most"]:
      raise errors.UsageError(f"{flag} must be at most {rule['at_most']}.")


def to_json(config: Any) -> str:
  """Returns the configuration as an indented JSON object, fields in their order."""
  return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(config_class: type[Config], text: str, origin: str) -> Config:
  """Reads a configuration that `to_json` wrote.

  Raises:
    errors.ConfigError: `text`, read from the file `origin`, is not JSON or has
      fields that `config_class` does not know or lacks some that it requires.
  """
  try:
    fields = json.loads(text)
    config = config_class(**fields)
  except (json.JSONDecodeError, TypeError) as error:
    if kind := storage.kind_of_text(text.encode()):
      raise errors.ConfigError(f"{origin} is {kind}.") from error
    raise errors.ConfigError(
      f"{origin} is not a {config_class.__name__} of this version ({error}); "
      "restore the file or use another workdir."
    ) from error
  return config


def subset(kind: type[Config], settings: Any) -> Config:
  """Builds a dataclass from those of the settings that have its fields' names."""
  names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
  return kind(**{name: getattr(settings, name) for name in names})


def conflicts(old: Any, new: Any) -> list[str]:
  """Lists, as `name: old -> new`, the fields that differ and must not."""
  return [
    f"{field.name}: {getattr(old, field.name)} -> {getattr(new, field.name)}"
    for field in dataclasses.fields(new)
    if not field.metadata["may_change"]
    and getattr(old, field.name) != getattr(new, field.name)
  ]
