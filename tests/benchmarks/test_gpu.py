import dataclasses
import importlib.machinery
import json
import pathlib
import subprocess
import sys
import time
import types

import pytest

from benchmarks import gpu
from facedist import errors

TINY = gpu.BenchmarkConfig(
  backbones="tinynet",
  batches="4",
  policies="float32",
  jit_compile="off",
  inputs="constant",
  image_size=32,
  steps=2,
)


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
  """PyTorch cannot be imported."""
  monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture
def some_torch(monkeypatch: pytest.MonkeyPatch) -> None:
  """There is a module of PyTorch's name."""
  stub = types.ModuleType("torch")
  stub.__spec__ = importlib.machinery.ModuleSpec("torch", None)
  monkeypatch.setitem(sys.modules, "torch", stub)


@pytest.mark.slow
@pytest.mark.usefixtures("no_torch")
def test_a_tiny_case_is_measured_and_written_without_pytorch(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
  output = tmp_path / "gpu.json"
  gpu.main(dataclasses.replace(TINY, output=str(output)))
  found = json.loads(output.read_text())
  assert found["left_out"] == found["ratios"] == found["best"] == []
  assert found["torch"] is None
  (result,) = found["results"]
  assert (result["backbone"], result["batch"], result["framework"]) == (
    "tinynet",
    4,
    "tensorflow",
  )
  assert result["images_per_second"] * result["step_seconds"] == pytest.approx(4)
  assert result["tflops_per_gpu"] > 0
  assert result["gradient_bytes"] > 0
  assert result.keys() >= {"share_of_peak", "peak_memory_bytes", "input_wait"}
  printed = capsys.readouterr().out
  assert "PyTorch is not installed" in printed
  assert "| constant | tensorflow | " in printed


@pytest.mark.slow
def test_pytorch_trains_the_same_case(monkeypatch: pytest.MonkeyPatch):
  pytest.importorskip("torch", reason="PyTorch is not installed")
  monkeypatch.setenv("OMP_NUM_THREADS", "1")  # others wait for each other
  found = gpu.run(TINY)
  tensorflow, torch = found["results"]
  assert (tensorflow["framework"], torch["framework"]) == ("tensorflow", "torch")
  assert torch.keys() == tensorflow.keys()
  for key in ("tflops_per_gpu", "gradient_bytes"):  # of one image, of one step
    share = torch["images_per_second"] / tensorflow["images_per_second"]
    expected = tensorflow[key] * (share if key == "tflops_per_gpu" else 1)
    assert torch[key] == pytest.approx(expected)
  (ratio,) = found["ratios"]
  expected = tensorflow["images_per_second"] / torch["images_per_second"]
  assert ratio["ratio"] == expected


@pytest.mark.usefixtures("some_torch")
def test_cases_without_time_are_listed():
  settings = gpu.BenchmarkConfig(batches="4", image_size=32, minutes=0.0)
  assert len(gpu.cases(settings)) == 4 * 3 * 2 * 2 * 2
  found = gpu.run(dataclasses.replace(settings, frameworks="tensorflow"))
  assert found["results"] == []
  assert len(found["left_out"]) == 4 * 3 * 2 * 2


@pytest.mark.usefixtures("some_torch")
def test_the_first_cases_have_the_first_of_every_list_in_both_frameworks():
  found = gpu.cases(gpu.BenchmarkConfig())
  assert [(case.input, case.framework) for case in found[:4]] == [
    ("shards", "tensorflow"),
    ("shards", "torch"),
    ("constant", "tensorflow"),
    ("constant", "torch"),
  ]
  for case in found[:4]:
    first = (case.backbone, case.batch, case.policy, case.jit_compile)
    assert first == ("resnet50", 256, "mixed_float16", "off")
  assert len(set(found)) == len(found)


@pytest.mark.usefixtures("no_torch")
def test_without_pytorch_its_cases_alone_are_refused():
  with pytest.raises(errors.UsageError, match=r"frameworks=torch.*not installed"):
    gpu.cases(dataclasses.replace(TINY, frameworks="torch"))
  with pytest.raises(errors.UsageError, match="frameworks=jax"):
    gpu.cases(dataclasses.replace(TINY, frameworks="tensorflow,jax"))


def row(framework: str, rate: float, *, batch: int = 256, jit_compile: str = "off"):
  """A result of resnet50 from shards."""
  case = gpu.Case("resnet50", batch, "mixed_float16", jit_compile, "shards", framework)
  return dataclasses.asdict(case) | {"images_per_second": rate}


def test_ratios_are_of_equal_cases_and_of_the_best_against_eager_pytorch():
  results = [
    row("torch", 4000.0),
    row("tensorflow", 3000.0),
    row("tensorflow", 5000.0, jit_compile="on"),
    row("torch", 10_000.0, jit_compile="on"),
    row("tensorflow", 6000.0, batch=512, jit_compile="on"),
  ]
  found = gpu.ratios(results)
  assert [(each["jit_compile"], each["ratio"]) for each in found] == [
    ("off", 0.75),
    ("on", 0.5),
  ]
  assert list(found[0].values())[-3:] == [3000.0, 4000.0, 0.75]  # as main prints them
  (best,) = gpu.best_ratios(results)
  assert (best["backbone"], best["policy"], best["input"]) == (
    "resnet50",
    "mixed_float16",
    "shards",
  )
  assert best["ratio"] == 6000 / 4000
  assert (best["tensorflow_batch"], best["torch_batch"]) == (512, 256)
  assert gpu.best_ratios(results[:1]) == []


def test_a_case_that_takes_too_long_ends_with_its_processes(tmp_path: pathlib.Path):
  pid_file = tmp_path / "pid"
  script = f"sleep 60 & echo $! > {pid_file}; wait"
  with pytest.raises(subprocess.TimeoutExpired):
    gpu.run_group(["sh", "-c", script], 1.0)
  status = pathlib.Path("/proc", pid_file.read_text().strip(), "stat")
  deadline = time.monotonic() + 10
  while status.exists() and status.read_text().split()[2] != "Z":
    assert time.monotonic() < deadline, "the process is still there"
    time.sleep(0.01)


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
