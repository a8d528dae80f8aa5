"""What checks find, as lines, as JSON and as exit codes."""

from collections.abc import Iterator

from facedist import errors
from facedist.preflight import checks
from facedist.preflight.checks import BAD, WARNING, Finding


def broken() -> str:
  raise errors.DataError("train.tfrecord has 3 bytes; 4 are expected; copy it again.")


def test_a_check_that_returns_is_good():
  assert str(checks.attempt("flags", lambda: "valid")) == "ok      flags: valid"


def test_an_error_becomes_a_line_with_its_fix_and_its_exit_code():
  found = checks.attempt("data", broken)
  assert str(found) == (
    "bad     data: train.tfrecord has 3 bytes; 4 are expected -> copy it again."
  )
  assert found.exit_code == errors.ExitCode.DATA


def test_the_exit_code_is_that_of_the_first_bad_finding():
  warning = Finding("clocks", WARNING, "far apart", "run NTP")
  good = checks.ok_finding("flags", "valid")
  assert checks.exit_code([good, warning]) == errors.ExitCode.DONE
  late = Finding("ports", BAD, "shut", "open", errors.ExitCode.PEER_LOST)
  found = [good, checks.attempt("data", broken), late]
  assert checks.exit_code(found) == errors.ExitCode.DATA
  bad = checks.first_bad(found)
  assert bad is found[1]
  error = checks.error_of(bad)
  assert str(error) == "train.tfrecord has 3 bytes; 4 are expected; copy it again."
  assert error.exit_code == errors.ExitCode.DATA
  assert checks.first_bad([good, warning]) is None


def test_what_is_raised_between_findings_is_the_last_of_them():
  def two_checks() -> Iterator[Finding]:
    yield checks.ok_finding("names", "all resolve")
    broken()

  good, bad = checks.caught("ports", two_checks())
  assert good.state == checks.GOOD
  assert (bad.check, bad.exit_code) == ("ports", errors.ExitCode.DATA)
