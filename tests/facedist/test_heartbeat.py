from facedist import progress
from tfrecords_tools.sources import tables


def test_a_line_comes_only_when_it_is_time(caplog, monkeypatch):
  caplog.set_level("INFO", logger="absl")
  shown = progress.HeartbeatFile("planned %s images")
  shown.beat(5)
  assert caplog.text == ""
  monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
  shown.beat(1_234_567)
  assert "planned 1,234,567 images" in caplog.text


def test_a_long_sort_shows_that_it_lives(caplog, monkeypatch):
  caplog.set_level("INFO", logger="absl")
  monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
  records = [(b"%d" % number, b"") for number in range(25)]
  list(tables.sorted_by_key(records, records_a_run=10))
  assert [record.getMessage() for record in caplog.records] == [
    "sorting on disk: 10 rows so far",
    "sorting on disk: 20 rows so far",
  ]
