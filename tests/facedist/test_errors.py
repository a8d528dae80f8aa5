"""facedist.errors: what the exit codes tell a scheduler."""

import signal

import pytest

from facedist import errors


def test_exit_codes_are_those_that_scripts_rely_on():
  assert {code.name: code.value for code in errors.ExitCode} == {
    "DONE": 0,
    "INTERNAL": 1,
    "USAGE": 2,
    "CONFIG": 3,
    "DATA": 4,
    "PARTIAL": 5,
    "DIVERGED": 6,
    "SAVING": 7,
    "SETS_DIFFER": 8,
    "NOT_FORMED": 142,
    "PREEMPTED": 143,
    "PEER_LOST": 144,
    "UNREACHABLE": 145,
    "STUCK": 146,
    "DIFFERENT": 147,
  }


def test_only_what_a_restart_can_mend_is_128_or_above():
  restart = {code for code in errors.ExitCode if code >= 128}
  assert {code.name for code in restart} == {
    "NOT_FORMED",
    "PREEMPTED",
    "PEER_LOST",
    "UNREACHABLE",
    "STUCK",
    "DIFFERENT",
  }
  assert errors.ExitCode.PREEMPTED == 128 + signal.SIGTERM
  assert errors.ExitCode.NOT_FORMED == 128 + signal.SIGALRM


@pytest.mark.parametrize(
  ("error", "code"),
  [
    (errors.FacedistError, 1),
    (errors.UsageError, 2),
    (errors.ConfigError, 3),
    (errors.DataError, 4),
    (errors.AccessError, 4),
    (errors.DivergedError, 6),
    (errors.SavingError, 7),
    (errors.PreemptedError, 143),
    (errors.PeerLostError, 144),
    (errors.UnreachableError, 145),
    (errors.DifferentError, 147),
  ],
)
def test_each_error_carries_its_exit_code(error: type, code: int):
  assert issubclass(error, errors.FacedistError)
  assert error("what, the rule, the fix.").exit_code == code
