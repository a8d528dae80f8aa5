"""Running a command: its flags, its log, its exit code."""

import functools
import logging as python_logging
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from facedist import errors, storage
from facedist.config import common, flag_files
from facedist.config.fields import Config
from facedist.config.parsing import define_flags, describe_flags, from_flags


def run_command(
  main: Callable[[Config], int | None], config_class: type[Config]
) -> None:
  """Runs `main` on the configuration parsed from the command line, then exits.

  A FacedistError, or an error of the system about a file, ends the process with one
  line on stderr and its exit code; any other exception keeps its traceback and ends it
  with 1. What `main` returns is the exit code; none means 0.
  """
  define_flags(config_class, flags.FLAGS)
  define_flags(common.CommonConfig, flags.FLAGS)

  def guarded_main(argv: Sequence[str]) -> int:
    try:
      if len(argv) > 1:
        raise errors.UsageError(
          f"{argv[1]!r} is not a flag; flags start with --, see --help."
        )
      common.export(flags.FLAGS)
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


def say_why(error: errors.FacedistError) -> None:
  """Prints the last line of a process that ends with an error whose cause is known."""
  sys.stdout.flush()
  print(f"error: {error}", file=sys.stderr, flush=True)


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


def _print_help(documentation: str | None, config_class: type) -> None:
  """Prints what --help shows, to a reader that may close before the end."""
  try:
    print(f"{(documentation or '').strip()}\n")
    print(describe_flags(config_class))
    print(describe_flags(common.CommonConfig))
    print("\n--flagfile=FILE reads flags from a file, local or gs://, one a line. One")
    print("in a bucket is reached as --storage_... flags outside of it say.")
    sys.stdout.flush()
  except BrokenPipeError:  # what `| head` does; nor can Python flush it in the end
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse_flags(
  argv: Sequence[str], *, documentation: str | None, config_class: type
) -> list[str]:
  """Parses `argv`; a wrong flag is one line on stderr and the usage exit code."""
  if any(argument in ("--help", "-help", "-h") for argument in argv[1:]):
    _print_help(documentation, config_class)
    sys.exit(errors.ExitCode.DONE)
  try:
    return flags.FLAGS(flag_files.expand(argv, flags.FLAGS))
  except errors.FacedistError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
  except (flags.Error, ValueError) as error:  # the latter of --noflag=value
    text = str(error).removeprefix("ERROR:: ").rstrip(".")
    end = "" if text.endswith("?") else "."
    print(f"error: {text}{end} See --help.", file=sys.stderr)
    sys.exit(errors.ExitCode.USAGE)
