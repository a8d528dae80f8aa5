"""Progress lines: when they are logged, and what they say."""

import pytest

from facedist import progress


@pytest.fixture
def clock(monkeypatch):
  """A clock to set by hand, in seconds."""
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def test_the_line_tells_rate_and_time_left(clock):
  shown = progress.Progress("built", total=4800)
  first = "built 0 of 4,800 images (0 %), 0 images/s, unknown time left"
  assert shown.line() == first
  clock[0] += 4
  shown.advance(1200)
  expected = "built 1,200 of 4,800 images (25 %), 300 images/s, 12 s left"
  assert shown.line() == expected


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (3000, "50 min"), (12000, "3 h 20 min")],
)
def test_durations_are_rounded_as_people_say_them(seconds, text):
  assert progress.duration(seconds) == text


def test_a_line_is_logged_every_ten_seconds(clock, caplog):
  caplog.set_level("INFO", logger="absl")
  shown = progress.Progress("built", total=100)
  for _ in range(25):
    clock[0] += 1
    shown.advance(1)
  assert [line.split(" of")[0] for line in caplog.messages] == ["built 10", "built 20"]


def test_items_pass_through_while_their_images_are_counted(clock, caplog):
  caplog.set_level("INFO", logger="absl")
  seen = []
  for item in progress.over([1000, 2000, 600], "embedded", total=3600, size=int):
    seen.append(item)
    clock[0] += 6
  assert seen == [1000, 2000, 600]
  expected = "embedded 3,000 of 3,600 images (83 %), 250 images/s, 2 s left"
  assert caplog.messages == [expected]


def test_a_growing_count_is_logged_only_after_ten_seconds(clock, caplog):
  caplog.set_level("INFO", logger="absl")
  shown = progress.CountLogger("planned %s images")
  shown.update(5)
  assert caplog.text == ""
  clock[0] += 10
  shown.update(1_234_567)
  assert "planned 1,234,567 images" in caplog.text
