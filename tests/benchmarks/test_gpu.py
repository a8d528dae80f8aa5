import json
import pathlib

import pytest

from benchmarks import gpu


def test_a_tiny_case_is_measured_and_written(tmp_path: pathlib.Path):
  output = tmp_path / "gpu.json"
  settings = gpu.BenchmarkConfig(
    backbones="tinynet",
    batches="4",
    policies="float32",
    jit_compile="off",
    inputs="constant",
    image_size=32,
    steps=2,
    output=str(output),
  )
  gpu.main(settings)
  found = json.loads(output.read_text())
  assert found["left_out"] == []
  (result,) = found["results"]
  assert (result["backbone"], result["batch"], result["input"]) == (
    "tinynet",
    4,
    "constant",
  )
  assert result["images_per_second"] * result["step_seconds"] == pytest.approx(4)
  assert result["tflops_per_gpu"] > 0
  assert result["gradient_bytes"] > 0
  assert result.keys() >= {"share_of_peak", "peak_memory_bytes", "input_wait"}


def test_cases_without_time_are_listed():
  settings = gpu.BenchmarkConfig(batches="4", image_size=32, minutes=0.0)
  found = gpu.run(settings)
  assert found["results"] == []
  assert len(found["left_out"]) == len(gpu.cases(settings)) == 4 * 3 * 2 * 2


def test_the_first_case_has_the_first_of_every_list():
  settings = gpu.BenchmarkConfig()
  found = gpu.cases(settings)
  assert found[0] == gpu.Case("resnet50", 256, "mixed_float16", "off", "shards")
  assert len(set(found)) == len(found)


@pytest.mark.parametrize(
  ("chip", "policy", "expected"),
  [
    ("NVIDIA H100 80GB HBM3", "mixed_bfloat16", 989),
    ("NVIDIA H100 80GB HBM3", "float32", 494.5),
    ("A chip of tomorrow", "float32", None),
  ],
)
def test_peak_of_known_chips(chip: str, policy: str, expected: float | None):
  assert gpu.peak_tflops(chip, policy) == expected
