import pytest

from benchmarks import timing, train_step


@pytest.mark.slow
def test_every_ratio_is_measured_on_a_tiny_case():
  settings = train_step.BenchmarkConfig(
    backbone="tinynet",
    policies="float32",
    batch=4,
    steps=2,
    rounds=1,
    worker_batch=4,
    worker_rounds=1,
  )
  ratios = train_step.run(settings)
  assert set(ratios) == {
    "float32: trainer's rate / bare step's",
    "float32: frozen step / forward pass",
    "two workers / (2 x one worker)",
  }
  assert all(ratio > 0 for ratio in ratios.values())


@pytest.mark.parametrize(("has_it", "expected"), [(True, 2), (False, 1)])
def test_bfloat16_is_measured_only_where_the_machine_has_it(
  has_it: bool, expected: int, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(timing, "has_bfloat16", lambda: has_it)
  assert len(train_step._measurable(["float32", "mixed_bfloat16"])) == expected
