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
    "PREEMPTED": 143,
    "PEER_LOST": 144,
    "UNREACHABLE": 145,
  }


def test_only_what_a_restart_can_mend_is_128_or_above():
  restart = {code for code in errors.ExitCode if code >= 128}
  assert restart == {
    errors.ExitCode.PREEMPTED,
    errors.ExitCode.PEER_LOST,
    errors.ExitCode.UNREACHABLE,
  }
  assert errors.ExitCode.PREEMPTED == 128 + signal.SIGTERM


@pytest.mark.parametrize(
  ("error", "code"),
  [
    (errors.FacedistError, 1),
    (errors.UsageError, 2),
    (errors.ConfigError, 3),
    (errors.DataError, 4),
    (errors.DivergedError, 6),
    (errors.PeerLostError, 144),
    (errors.UnreachableError, 145),
  ],
)
def test_each_error_carries_its_exit_code(error: type, code: int):
  assert issubclass(error, errors.FacedistError)
  assert error("what, the rule, the fix.").exit_code == code
