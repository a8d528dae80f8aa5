import pytest

from benchmarks import build_shards


@pytest.mark.slow
def test_the_builder_is_measured_on_drawn_images_where_there_are_no_real_ones(
  monkeypatch, tmp_path, caplog
):
  caplog.set_level("INFO", logger="absl")
  monkeypatch.delenv("FACEDIST_REAL_DATA", raising=False)
  monkeypatch.setattr(build_shards, "DRAWN_IMAGES", 60)
  ratios = build_shards.run(
    build_shards.BenchmarkConfig(
      copies=2, rounds=1, num_processes=2, scratch=str(tmp_path)
    )
  )
  (ratio,) = ratios.values()
  assert ratio > 0
  assert "120 drawn images (FACEDIST_REAL_DATA is not set)" in caplog.text
