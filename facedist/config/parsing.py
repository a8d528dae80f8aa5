"""A flag for each field of a configuration, what `--help` says of it, and its value."""

import dataclasses
import textwrap
import types
import typing
from collections.abc import Callable
from typing import Any

from absl import flags

from facedist import errors
from facedist.config import paths
from facedist.config.fields import Config, validate


def define_flags(config_class: type, flag_values: flags.FlagValues) -> None:
  """Defines a flag per field of `config_class`, typed as the field is."""
  define: dict[type, Callable[..., Any]] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
  }
  hints = typing.get_type_hints(config_class)
  for field in dataclasses.fields(config_class):
    default = None if field.default is dataclasses.MISSING else field.default
    kind = _plain_type(hints[field.name])
    define[kind](field.name, default, field.metadata["help"], flag_values=flag_values)


def describe_flags(config_class: type) -> str:
  """Returns what `--help` says of the fields, in their order, under their headings."""
  lines = []
  for field in dataclasses.fields(config_class):
    if field.metadata["heading"] is not None:
      lines += ["", f"{field.metadata['heading']}:"]
    lines.append(f"  {_usage(field)}")
    indent = " " * 6
    lines += textwrap.wrap(
      field.metadata["help"], 88, initial_indent=indent, subsequent_indent=indent
    )
  return "\n".join(lines)


def _usage(field: dataclasses.Field) -> str:
  """Returns a flag with its default and its rule: `--dropout=0  (0 to 0.9)`."""
  rule, default = field.metadata, field.default
  low, high = rule["at_least"], rule["at_most"]
  if isinstance(default, bool):
    return f"--{field.name}" + (f"  (off: --no{field.name})" if default else "")
  notes = []
  if default is dataclasses.MISSING:
    notes.append("required")
  if rule["choices"] is not None:
    others = [choice for choice in rule["choices"] if choice != default]
    notes.append("or " + ", ".join(others))
  if low is not None and high is not None:
    notes.append(f"{low:g} to {high:g}")
  elif low is not None or high is not None:
    notes.append(f"at least {low:g}" if high is None else f"at most {high:g}")
  value = "" if default in (None, dataclasses.MISSING) else str(default)
  return f"--{field.name}={value.removesuffix('.0')}" + (
    f"  ({'; '.join(notes)})" if notes else ""
  )


def from_flags(config_class: type[Config], flag_values: flags.FlagValues) -> Config:
  """Builds and validates a configuration from parsed flags.

  Raises:
    errors.UsageError: A required flag is missing or a value breaks its rule.
  """
  values = {}
  for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
    value = flag_values[field.name].value
    if value is None and field.default is dataclasses.MISSING:
      raise errors.UsageError(f"--{field.name} is required: {field.metadata['help']}")
    if value is not None and field.metadata["path"]:
      value = paths.normalise(field.name, value)
    if value is not None and field.metadata["paths"]:
      value = paths.normalise_list(field.name, value)
    values[field.name] = value
  config = config_class(**values)
  validate(config)
  return config


def _plain_type(hint: Any) -> Any:
  """Returns `T` of `T | None`, any other type as it is."""
  if isinstance(hint, types.UnionType):
    return next(kind for kind in hint.__args__ if kind is not type(None))
  return hint
