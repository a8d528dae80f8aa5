import pytest

from benchmarks import train_step


@pytest.mark.slow
def test_every_ratio_is_measured_on_a_tiny_case():
  settings = train_step.BenchmarkConfig(
    backbone="tinynet",
    policies="mixed_bfloat16",
    batch=4,
    steps=2,
    rounds=1,
    worker_batch=4,
    worker_rounds=1,
  )
  ratios = train_step.run(settings)
  assert set(ratios) == {
    "mixed_bfloat16: trainer's rate / bare step's",
    "mixed_bfloat16: frozen step / forward pass",
    "two workers / (2 x one worker)",
  }
  assert all(ratio > 0 for ratio in ratios.values())
