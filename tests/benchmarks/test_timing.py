"""Interleaved timings on a clock that the test holds."""

import os

import pytest

from benchmarks import timing


class Clock:
  """Seconds that pass only when told."""

  now = 0.0

  def __call__(self) -> float:
    return self.now

  def pass_by(self, seconds: float) -> None:
    self.now += seconds


def test_each_side_has_the_median_of_its_counted_rounds():
  clock = Clock()
  slow = iter([100.0, 3.0, 9.0, 4.0])  # the first round warms up
  fast = iter([100.0, 1.0, 2.0, 7.0])
  sides = {
    "slow": lambda: clock.pass_by(next(slow)),
    "fast": lambda: clock.pass_by(next(fast)),
  }
  seconds = timing.interleaved(sides, rounds=3, clock=clock)
  assert seconds == {"slow": 4.0, "fast": 2.0}


def test_sides_take_turns_and_every_other_round_is_reversed():
  calls = []
  timing.interleaved(
    {name: lambda name=name: calls.append(name) for name in "abc"}, rounds=2
  )
  assert "".join(calls) == "abc" + "cba" + "abc"


def test_what_comes_before_is_not_counted():
  clock = Clock()
  seconds = timing.interleaved(
    {"a": lambda: clock.pass_by(1.0), "b": lambda: clock.pass_by(2.0)},
    rounds=2,
    before={"a": lambda: clock.pass_by(50.0)},
    clock=clock,
  )
  assert seconds == {"a": 1.0, "b": 2.0}


def test_each_round_is_reported_as_it_ends(capsys: pytest.CaptureFixture[str]):
  timing.interleaved({"a": lambda: None}, rounds=2, title="float32")
  assert capsys.readouterr().err.splitlines() == [
    "float32: 0 of 2 rounds",
    "float32: 1 of 2 rounds",
    "float32: 2 of 2 rounds",
  ]


def test_the_machine_is_named_with_its_cores():
  assert f"{len(os.sched_getaffinity(0))} cores" in timing.machine()
