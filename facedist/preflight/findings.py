"""What a check found: one line, and what to do about it."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator

from facedist import errors

GOOD, WARNING, BAD = "ok", "warning", "bad"


@dataclasses.dataclass(frozen=True)
class Finding:
  """The outcome of one check.

  Attributes:
    check: Its name, such as clocks.
    state: GOOD, WARNING or BAD.
    text: What was found, in a line.
    mend: What to do; empty where all is well.
    exit_code: What a BAD one ends the command with.
  """

  check: str
  state: str
  text: str
  mend: str = ""
  exit_code: errors.ExitCode = errors.ExitCode.USAGE

  def __str__(self) -> str:
    mend = f" -> {self.mend}" if self.mend else ""
    return f"{self.state:7s} {self.check}: {self.text}{mend}"


def good(check: str, text: str) -> Finding:
  """Returns what a check says that found nothing wrong."""
  return Finding(check, GOOD, text)


def attempt(check: str, run: Callable[[], str | Finding]) -> Finding:
  """Runs a check that returns what it found, or raises what is wrong."""
  try:
    found = run()
    return found if isinstance(found, Finding) else good(check, found)
  except errors.FacedistError as error:
    return of_error(check, error)


def caught(check: str, found: Iterable[Finding]) -> Iterator[Finding]:
  """Yields findings; what is raised meanwhile is the last, of that check."""
  try:
    yield from found
  except errors.FacedistError as error:
    yield of_error(check, error)


def of_error(check: str, error: errors.FacedistError) -> Finding:
  """Returns a BAD finding.

  The errors of this project say what to do after the last semicolon of their line.
  """
  text, _, mend = str(error).rpartition("; ")
  text, mend = (text, mend) if text else (mend, "")
  return Finding(check, BAD, text, mend, errors.ExitCode(error.exit_code))


def exit_code(found: Iterable[Finding]) -> errors.ExitCode:
  """Returns DONE, or the exit code of the first BAD finding."""
  for finding in found:
    if finding.state == BAD:
      return finding.exit_code
  return errors.ExitCode.DONE


def raise_for(found: Iterable[Finding]) -> None:
  """Raises the first BAD finding as an error with its exit code."""
  for finding in found:
    if finding.state == BAD:
      mend = f"; {finding.mend}" if finding.mend else ""
      error = errors.FacedistError(f"{finding.text}{mend}")
      error.exit_code = finding.exit_code
      raise error


def to_json(found: Iterable[Finding]) -> str:
  """Returns a JSON object: `ready`, `exit_code` and the `findings`.

  Each has check, state, text, mend, and the exit code that it asks for: 0 unless BAD.
  """
  found = tuple(found)
  rows = [
    {
      "check": finding.check,
      "state": finding.state,
      "text": finding.text,
      "mend": finding.mend,
      "exit_code": int(exit_code([finding])),
    }
    for finding in found
  ]
  code = int(exit_code(found))
  ready = code == errors.ExitCode.DONE
  return json.dumps({"ready": ready, "exit_code": code, "findings": rows}, indent=1)
