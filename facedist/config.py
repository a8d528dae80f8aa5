"""Configurations: frozen dataclasses whose fields are a command's flags.

A command declares one frozen dataclass with `setting(...)` fields and hands it to
`run_command`, which defines a flag per field, parses, validates and calls `main`.
"""

import dataclasses
import functools
import json
import logging as python_logging
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from absl import app, flags, logging

from facedist import errors

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
  heading: str | None = None,
) -> Any:
  """Declares a configuration field that becomes a flag.

  Args:
    default: Value when the flag is not given; none makes the flag required.
    help: One line for `--help`, with units.
    choices: The only values allowed, for a string.
    at_least: Smallest value allowed, for a number.
    at_most: Largest value allowed, for a number.
    may_change: Whether a second start in the same workdir may have another value.
    heading: What `--help` writes above this field; it holds for those that follow.
  """
  metadata = {
    "help": help,
    "choices": choices,
    "at_least": at_least,
    "at_most": at_most,
    "may_change": may_change,
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
    if rule["choices"] is not None and value not in rule["choices"]:
      choices = ", ".join(rule["choices"])
      raise errors.UsageError(f"{flag} is not known; choose one of {choices}.")
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
    raise errors.ConfigError(
      f"{origin} is not a {config_class.__name__} of this version ({error}); "
      "restore the file or use another workdir."
    ) from error
  return config


def conflicts(old: Any, new: Any) -> list[str]:
  """Lists, as `name: old -> new`, the fields that differ and must not."""
  return [
    f"{field.name}: {getattr(old, field.name)} -> {getattr(new, field.name)}"
    for field in dataclasses.fields(new)
    if not field.metadata["may_change"]
    and getattr(old, field.name) != getattr(new, field.name)
  ]


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
    values[field.name] = value
  config = config_class(**values)
  validate(config)
  return config


def run_command(
  main: Callable[[Config], int | None], config_class: type[Config]
) -> None:
  """Runs `main` on the configuration parsed from the command line, then exits.

  A FacedistError ends the process with its one line on stderr and its exit code;
  any other exception keeps its traceback and ends it with 1. What `main` returns
  is the exit code; none means 0.
  """
  define_flags(config_class, flags.FLAGS)

  def guarded_main(argv: Sequence[str]) -> int:
    try:
      if len(argv) > 1:
        raise errors.UsageError(
          f"{argv[1]!r} is not a flag; flags start with --, see --help."
        )
      return main(from_flags(config_class, flags.FLAGS)) or errors.ExitCode.DONE
    except errors.FacedistError as error:
      sys.stdout.flush()
      print(f"error: {error}", file=sys.stderr, flush=True)
      return error.exit_code

  _set_up_logging()
  parse = functools.partial(
    _parse_flags,
    documentation=sys.modules[main.__module__].__doc__,
    config_class=config_class,
  )
  app.run(guarded_main, flags_parser=parse)


def _set_up_logging() -> None:
  """Sends absl's log to stderr from INFO on, each line after the time of day."""
  logging.set_verbosity(logging.INFO)
  logging.set_stderrthreshold(logging.INFO)
  logging.get_absl_handler().setFormatter(
    python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
  )
  # TensorFlow's logger prints by itself what it also hands on to absl's
  tensorflow_logger = python_logging.getLogger("tensorflow")
  tensorflow_logger.setLevel(python_logging.WARNING)
  tensorflow_logger.propagate = False


def _parse_flags(
  argv: Sequence[str], *, documentation: str | None, config_class: type
) -> list[str]:
  """Parses `argv`; a wrong flag is one line on stderr and the usage exit code."""
  if any(argument in ("--help", "-help", "-h") for argument in argv[1:]):
    print(f"{(documentation or '').strip()}\n")
    print(describe_flags(config_class))
    print("\n--flagfile=FILE reads flags from a file, one a line.")
    sys.exit(errors.ExitCode.DONE)
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    text = str(error).removeprefix("ERROR:: ")
    print(f"error: {text} See --help.", file=sys.stderr)
    sys.exit(errors.ExitCode.USAGE)


def _plain_type(hint: Any) -> Any:
  """Returns `T` of `T | None`, any other type as it is."""
  if isinstance(hint, types.UnionType):
    return next(kind for kind in hint.__args__ if kind is not type(None))
  return hint
