"""Turns a frozen dataclass into the flags of a command, and runs the command.

In this order: declaring fields (`setting`) and checking their rules; JSON; a flag for
each field and its `--help`; the flags that every command has (`CommonConfig`); flag
files (`expand`); and `run_command`, which parses the flags and calls `main`.
"""

import dataclasses
import functools
import json
import logging as python_logging
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from absl import app, flags, logging

from facedist import errors, storage
from facedist.config import paths

LARGEST_INT = 2**31 - 1
"""The largest integer of a flag: TensorFlow and NumPy use 32 bits in some places."""
LARGEST_FLOAT = 10**9
"""The largest number of a flag, so that times and epochs fit timers and counters."""
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
    path: Whether it is a path, to be normalised by `paths.normalise`.
    paths: Whether it is one path or several with commas between them.
    on_disk: Whether it is a path that must be on this machine's disk, not gs://.
    heading: What `--help` writes above this field and the fields that follow.
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
  """Returns `table[name]`; raises a UsageError that lists the keys if there is none."""
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
  """Builds a dataclass from the attributes of `settings` that its fields name."""
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


def _plain_type(hint: Any) -> Any:
  """Returns `T` of `T | None`, any other type as it is."""
  if isinstance(hint, types.UnionType):
    return next(kind for kind in hint.__args__ if kind is not type(None))
  return hint


def describe_flags(config_class: type) -> str:
  """Returns the text of `--help` for the fields, in their order, under headings."""
  lines = []
  for field in dataclasses.fields(config_class):
    if field.metadata["heading"] is not None:
      lines += ["", f"{field.metadata['heading']}:"]
    indent = " " * 6
    lines += textwrap.wrap(
      _usage(field),
      88,
      initial_indent="  ",
      subsequent_indent=indent,
      break_long_words=False,
      break_on_hyphens=False,
    )
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
    notes.append(f"{low:.9g} to {high:.9g}")
  elif low is not None or high is not None:
    notes.append(f"at least {low:.9g}" if high is None else f"at most {high:.9g}")
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


@dataclasses.dataclass(frozen=True)
class CommonConfig:
  """The flags that every command has: how buckets are reached.

  They are not part of a command's own configuration, so that a restarted run may change
  them. Their values go to the environment, where `facedist.storage` and child processes
  find them; a variable that is already set there is the default.
  """

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
    errors.DEFAULT_STORAGE_DEADLINE_SECONDS,
    at_least=1,
    help="How long a failing request to a bucket is retried, in seconds.",
  )


_VARIABLES = {
  "storage_endpoint": errors.STORAGE_ENDPOINT,
  "storage_user_project": errors.STORAGE_USER_PROJECT,
  "storage_deadline_seconds": errors.STORAGE_DEADLINE_SECONDS,
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


_DIRECTIVE = re.compile(r"--?flagfile(?:=|\s+)(.+)")
_QUOTED = re.compile(r"""((?:--?\w+=)?)(["'])(.*)\2""")
_TWO_FLAGS = re.compile(r"--?\w+(?:=[^-\s]\S*)?\s+--?[A-Za-z]")
_COMMENT = re.compile(r"\s#(?:\s|$)")


def expand(argv: Sequence[str], known: flags.FlagValues | None = None) -> list[str]:
  """Returns the command line with each flag file replaced by the flags it holds.

  A file has a flag on each line, or a comment that starts with # or //, or
  --flagfile=FILE of another one. Names are relative to the folder of the process.

  Args:
    argv: The command line; words after -- stay as they are.
    known: The command's flags; flags in files must be among them.

  Raises:
    errors.UsageError: A file cannot be read, or holds itself.
  """
  joined = list(_joined(argv))
  end = joined.index("--") if "--" in joined else len(joined)
  return [*_expanded(joined[:end], (), known), *joined[end:]]


def _joined(argv: Sequence[str]) -> Iterator[str]:
  """Yields the words, with `--flagfile FILE` joined to one."""
  words = iter(argv)
  for word in words:
    if word not in ("--flagfile", "-flagfile"):
      yield word
    elif (name := next(words, None)) is not None:
      yield f"{word}={name}"
    else:
      raise errors.UsageError("--flagfile names no file; write --flagfile=FILE.")
    if word == "--":
      yield from words


def _expanded(
  words: Sequence[str], within: tuple[str, ...], known: flags.FlagValues | None
) -> Iterator[str]:
  """Yields the words, with each flag file replaced by its lines.

  Args:
    words: Words of the command line or lines of a file.
    within: The files that contain these words, the outermost first.
    known: The command's flags; None accepts any.
  """
  for word in words:
    found = _DIRECTIVE.fullmatch(word)
    if not found:
      yield word
      continue
    path = paths.normalise("flagfile", found[1])
    if path in within:
      raise errors.UsageError(
        f"--flagfile={path} holds itself ({' > '.join((*within, path))}); take it out "
        "of one of them."
      )
    yield from _expanded(_lines(path, known), (*within, path), known)


def _lines(path: str, known: flags.FlagValues | None) -> list[str]:
  """Returns the lines of a flag file without comments."""
  if storage.is_bucket(path):
    raise errors.UsageError(
      f"--flagfile={path} is in a bucket; copy it to a disk of this machine."
    )
  try:  # not through storage, which needs the size; a shell's <(...) has none
    with open(path, encoding="utf-8") as stream:
      lines = stream.readlines()
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, "strerror", None) or "it is not UTF-8"
    raise errors.UsageError(
      f"--flagfile={path} cannot be read ({reason}); give a text file of flags."
    ) from error
  found = []
  for number, line in enumerate(lines, 1):
    text = line.removeprefix("\ufeff").strip()
    if text and not text.startswith(("#", "//")):
      place = f"{path}, line {number}: {text!r}"
      flag = _flag_of(text, place)
      name = re.split(r"[=\s]", flag.lstrip("-"))[0]
      names = {name, name.removeprefix("no")}
      is_known = known is None or any(one in known for one in names)
      if not is_known and not _DIRECTIVE.fullmatch(flag):
        raise errors.UsageError(f"{place} is no flag of this command; see --help.")
      found.append(flag)
  return found


def _flag_of(text: str, place: str) -> str:
  """Returns the flag on a line, without quotes around it or its value.

  Raises:
    errors.UsageError: The line is not one flag.
  """
  if text.endswith("\\"):
    raise errors.UsageError(
      f"{place} ends in a backslash; write each flag in one line."
    )
  if quoted := _QUOTED.fullmatch(text):
    text = quoted[1] + quoted[3]
  if text in ("--help", "-help", "-h"):
    raise errors.UsageError(f"{place} is for the command line; take it out.")
  if not text.startswith("-"):
    raise errors.UsageError(f"{place} is not a flag; write --NAME=VALUE.")
  if _TWO_FLAGS.match(text):
    raise errors.UsageError(f"{place} has two flags; give each a line of its own.")
  if not quoted and _COMMENT.search(text):
    raise errors.UsageError(f"{place} has a comment behind a flag; put it above.")
  if not _DIRECTIVE.fullmatch(text) and re.match(r"--?\w+\s", text):
    raise errors.UsageError(f"{place} has a blank behind the name; write --NAME=VALUE.")
  return text


def run_command(
  main: Callable[[Config], int | None], config_class: type[Config]
) -> None:
  """Runs `main` on the configuration parsed from the command line, then exits.

  A FacedistError, or an error of the system about a file, ends the process with one
  line on stderr and its exit code; any other exception keeps its traceback and ends it
  with 1. The exit code is what `main` returns; None means 0.
  """
  define_flags(config_class, flags.FLAGS)
  define_flags(CommonConfig, flags.FLAGS)

  def guarded_main(argv: Sequence[str]) -> int:
    try:
      if len(argv) > 1:
        raise errors.UsageError(
          f"{argv[1]!r} is not a flag; flags start with --, see --help."
        )
      _check_keras()
      export(flags.FLAGS)
      return main(from_flags(config_class, flags.FLAGS)) or errors.ExitCode.DONE
    except errors.FacedistError as error:
      say_why(error)
      return error.exit_code
    except OSError as error:
      if (known := storage.explain(error)) is None:
        raise
      say_why(known)
      return known.exit_code

  _set_up_logging()
  parse = functools.partial(
    _parse_flags,
    documentation=sys.modules[main.__module__].__doc__,
    config_class=config_class,
  )
  app.run(guarded_main, flags_parser=parse)


def _check_keras() -> None:
  """Raises UsageError where TensorFlow is imported and its Keras is Keras 3."""
  tensorflow = sys.modules.get("tensorflow")
  if tensorflow is None:
    return
  found = getattr(tensorflow.keras, "__version__", "")  # tf-keras names none
  if found.startswith("3."):
    version = ".".join(tensorflow.__version__.split(".")[:2])
    raise errors.UsageError(
      f"tf.keras is Keras {found}, and facedist needs Keras 2: install "
      f"tf-keras=={version}.* and leave TF_USE_LEGACY_KERAS unset, or 1."
    )


def say_why(error: errors.FacedistError) -> None:
  """Prints the last line of a process that ends with a FacedistError."""
  sys.stdout.flush()
  print(f"error: {error}", file=sys.stderr, flush=True)


def _set_up_logging() -> None:
  """Sends absl's log to stderr from INFO on, each line after the time of day."""
  logging.set_verbosity(logging.INFO)
  logging.set_stderrthreshold(logging.INFO)
  logging.get_absl_handler().setFormatter(
    python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
  )
  # TensorFlow's logger prints its messages and also passes them to absl's logger.
  tensorflow_logger = python_logging.getLogger("tensorflow")
  tensorflow_logger.setLevel(python_logging.WARNING)
  tensorflow_logger.propagate = False


def _print_help(documentation: str | None, config_class: type) -> None:
  """Prints the help; the reader may close the pipe before the end."""
  try:
    print(f"{(documentation or '').strip()}\n")
    print(describe_flags(config_class))
    print(describe_flags(CommonConfig))
    print("\n--flagfile=FILE reads flags from a local text file, one flag a line.")
    sys.stdout.flush()
  except BrokenPipeError:  # `| head` does this; at exit Python could not flush it
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse_flags(
  argv: Sequence[str], *, documentation: str | None, config_class: type
) -> list[str]:
  """Parses `argv`; a wrong flag is one line on stderr and the usage exit code."""
  if any(argument in ("--help", "-help", "-h") for argument in argv[1:]):
    _print_help(documentation, config_class)
    sys.exit(errors.ExitCode.DONE)
  try:
    return flags.FLAGS(expand(argv, flags.FLAGS))
  except errors.FacedistError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
  except (flags.Error, ValueError) as error:  # the latter of --noflag=value
    text = str(error).removeprefix("ERROR:: ").rstrip(".")
    end = "" if text.endswith("?") else "."
    print(f"error: {text}{end} See --help.", file=sys.stderr)
    sys.exit(errors.ExitCode.USAGE)
