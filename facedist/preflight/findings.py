"""What a check found: one line, and what to do about it."""

import dataclasses
import json
from collections.abc import Callable, Iterable

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
  """Runs a check that returns what it found, in words if good, or raises what is wrong.

  The errors of this project say what to do after the last semicolon of their line.
  """
  try:
    found = run()
    return found if isinstance(found, Finding) else good(check, found)
  except errors.FacedistError as error:
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
  """Returns a JSON object: `ready`, and `findings` with check, state, text and mend."""
  found = tuple(found)
  rows = [
    {
      "check": finding.check,
      "state": finding.state,
      "text": finding.text,
      "mend": finding.mend,
    }
    for finding in found
  ]
  ready = exit_code(found) == errors.ExitCode.DONE
  return json.dumps({"ready": ready, "findings": rows}, indent=1)
