from facedist import progress
from tfrecords_tools import external_sort


def test_a_line_comes_only_when_it_is_time(caplog, monkeypatch):
  caplog.set_level("INFO", logger="absl")
  shown = progress.HeartbeatFile("planned %s images")
  shown.beat(5)
  assert caplog.text == ""
  monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
  shown.beat(1_234_567)
  assert "planned 1,234,567 images" in caplog.text


def test_a_long_sort_shows_its_progress(caplog, monkeypatch):
  caplog.set_level("INFO", logger="absl")
  monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
  monkeypatch.setattr(external_sort, "ROWS_A_BATCH", 10)
  records = [(b"%d" % number, b"") for number in range(25)]
  list(external_sort.sorted_by_key(records))
  assert [record.getMessage() for record in caplog.records] == [
    f"sorting on disk: {count} rows so far" for count in (10, 20, 25)
  ]
