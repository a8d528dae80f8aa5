"""Exit codes of commands, exceptions that carry them, and environment variables.

The variables hold the flags that every command has, so that child processes and
`facedist.storage` find them without a parameter through all layers.
"""

import enum


class ExitCode(enum.IntEnum):
  """The exit codes of every command; a scheduler restarts on 128 and above only."""

  DONE = 0
  """Everything is done."""
  INTERNAL = 1
  """A bug or an unexpected error; the traceback says where."""
  USAGE = 2
  """A flag is missing, unknown or out of range."""
  CONFIG = 3
  """The flags contradict the run that the workdir holds."""
  DATA = 4
  """The data are missing, corrupt or not what the run was started with."""
  PARTIAL = 5
  """Finished, but some inputs were skipped; each was named."""
  DIVERGED = 6
  """The loss is not finite."""
  SAVING = 7
  """Finished, but some checkpoints or logs could not be written; each was named."""
  SETS_DIFFER = 8
  """Two sets that were compared differ; the output says how."""
  NOT_FORMED = 142
  """The cluster did not form, or native code blocked Python (SIGALRM); restart me."""
  PREEMPTED = 143
  """Asked to stop (SIGTERM); restart me."""
  PEER_LOST = 144
  """Another worker of the cluster was lost; restart me."""
  UNREACHABLE = 145
  """A bucket did not answer in time, or a cached copy was corrupt; restart me."""
  STUCK = 146
  """This worker made no progress; its stacks were printed; restart me."""
  DIFFERENT = 147
  """Weights differ between replicas that must be the same; restart me."""


FIRST_RESTART_CODE = 128
"""Exit codes from here on ask for a restart; a signal's own 128 + n is among them."""


class FacedistError(Exception):
  """An error with a known cause; its text is one line: what, the rule, the fix."""

  exit_code = ExitCode.INTERNAL


class UsageError(FacedistError):
  """A flag is missing, unknown or out of range."""

  exit_code = ExitCode.USAGE


class ConfigError(FacedistError):
  """The flags contradict the run that the workdir holds."""

  exit_code = ExitCode.CONFIG


class DataError(FacedistError):
  """The data are missing, corrupt or not what the run was started with."""

  exit_code = ExitCode.DATA


class AccessError(FacedistError):
  """A bucket does not exist or denies access, so all of its objects are unusable.

  This is not a DataError, so that code that skips corrupt or missing files stops here.
  """

  exit_code = ExitCode.DATA


class DivergedError(FacedistError):
  """The loss is not finite."""

  exit_code = ExitCode.DIVERGED


class SavingError(FacedistError):
  """Finished, but some checkpoints or logs could not be written."""

  exit_code = ExitCode.SAVING


class PreemptedError(FacedistError):
  """Asked to stop, and all is saved; a restart continues at this step."""

  exit_code = ExitCode.PREEMPTED


class NotFormedError(FacedistError):
  """The cluster did not form: a port was in use, or a worker ended; retry."""

  exit_code = ExitCode.NOT_FORMED


class PeerLostError(FacedistError):
  """Another worker of the cluster was lost; a restart continues from a checkpoint."""

  exit_code = ExitCode.PEER_LOST


class UnreachableError(FacedistError):
  """A bucket did not answer within the deadline; it may do so later."""

  exit_code = ExitCode.UNREACHABLE


class CorruptCopyError(FacedistError):
  """A cached copy of a shard was corrupt and is removed; a restart fetches it again."""

  exit_code = ExitCode.UNREACHABLE


class DifferentError(FacedistError):
  """Weights differ between replicas; a restart continues from a checkpoint."""

  exit_code = ExitCode.DIFFERENT


def first_line(error: BaseException) -> str:
  """Returns the first line of what an error says, or its class if it says nothing."""
  return str(error).strip().partition("\n")[0] or type(error).__name__


STORAGE_ENDPOINT = "FACEDIST_STORAGE_ENDPOINT"
STORAGE_USER_PROJECT = "FACEDIST_STORAGE_USER_PROJECT"
STORAGE_DEADLINE_SECONDS = "FACEDIST_STORAGE_DEADLINE_SECONDS"
DEFAULT_STORAGE_DEADLINE_SECONDS = 300.0
