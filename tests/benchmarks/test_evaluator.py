"""The evaluator's benchmark on a few random patterns: its figures agree."""

import pytest

from benchmarks import evaluator

TINY = {"backbone": "vgg8", "checkpoints": 1, "pairs": 40, "image_size": 16}


@pytest.mark.parametrize("device_rate", [0.0, 400.0])
def test_it_measures_the_share_of_forward_passes(monkeypatch, device_rate):
  monkeypatch.delenv(evaluator.REAL_DATA, raising=False)
  settings = evaluator.BenchmarkConfig(**TINY, batch_size=40, device_rate=device_rate)
  results = evaluator.run(settings)
  assert 0 < results["forward / all"] < 1
  # 40 pairs of 80 images
  assert results["images/s"] * results["s/checkpoint"] == pytest.approx(80)
  if device_rate:  # each image is embedded twice, once mirrored
    forward_seconds = results["forward / all"] * results["s/checkpoint"]
    assert forward_seconds >= 160 / device_rate
