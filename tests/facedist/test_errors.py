"""facedist.errors: what the exit codes tell a scheduler."""

import signal

from facedist import errors


def test_exit_codes_are_those_that_scripts_rely_on():
  assert errors.ExitCode.PREEMPTED == 128 + signal.SIGTERM
  assert errors.ExitCode.NOT_FORMED == 128 + signal.SIGALRM
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
