"""What is said about long work where stderr is not a terminal."""

from facedist.evaluation import progress


def test_items_pass_through_and_a_line_says_rate_and_time_left(monkeypatch):
  said = []
  monkeypatch.setattr(
    progress.logging, "info", lambda text, *values: said.append(text % values)
  )
  times = iter([0.0, 4.0, 8.0, 12.0, 16.0])
  items = progress.shown(
    [1000, 1000, 1000, 600],
    total=3600,
    unit="images",
    size=lambda item: item,
    clock=lambda: next(times),
  )
  assert list(items) == [1000, 1000, 1000, 600]
  assert said == ["3,000 of 3,600 images, 250/s, 2 s left"]
