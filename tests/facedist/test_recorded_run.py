"""A run, shards and embeddings written by an earlier version are read by this one.

tests/facedist/recorded holds shards of noise, the checkpoint of a run stopped after
step 4, its embeddings, and the losses of steps 5 to 12, which the same version had
when it resumed. `losses.json` also names the CPU's instructions, because another
CPU may round differently.
"""

import hashlib
import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from tests import processes

RECORDED = pathlib.Path(__file__).parent / "recorded"


def is_the_recording_cpu() -> bool:
  """Says whether this CPU has the instructions of the one that recorded the run."""
  flags = re.search(
    r"^flags\s*: (.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE
  )
  if flags is None:
    return False
  text = " ".join(sorted(flags[1].split()))
  found = hashlib.sha256(text.encode()).hexdigest()[:16]
  return found == json.loads((RECORDED / "losses.json").read_text())["cpu_flags"]


@pytest.mark.slow
def test_a_run_of_an_earlier_version_resumes_with_the_same_losses(
  tmp_path: pathlib.Path,
):
  workdir = shutil.copytree(RECORDED / "run", tmp_path / "run")
  result = processes.run(
    "facedist.train",
    f"--flagfile={RECORDED / 'train.flags'}",
    "--strategy=one",
    f"--data_dir={RECORDED / 'shards'}",
    f"--workdir={workdir}",
  )
  assert result.returncode == 0, result.stderr
  lines = (workdir / "train_metrics.jsonl").read_text().splitlines()
  losses = {row["step"]: row["loss"] for row in map(json.loads, lines)}
  recorded = json.loads((RECORDED / "losses.json").read_text())["losses"]
  expected = {int(step): loss for step, loss in recorded.items()}
  assert list(losses) == list(expected)
  # float32 losses of 7 digits; another CPU adds up in another order
  tolerance = 0.0 if is_the_recording_cpu() else 1e-3
  np.testing.assert_allclose(
    list(losses.values()), list(expected.values()), rtol=tolerance
  )


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_gives_the_same_embeddings(
  tmp_path: pathlib.Path,
):
  output = tmp_path / "embeddings.json"
  result = processes.run(
    "facedist.embed",
    f"--workdir={RECORDED / 'run'}",
    f"--input={RECORDED / 'shards'}",
    f"--output={output}",
  )
  assert result.returncode == 0, result.stderr
  found = json.loads(output.read_text())
  expected = json.loads((RECORDED / "embeddings.json").read_text())
  assert found["weights_crc32c"] == expected["weights_crc32c"]
  faces = found.pop("embeddings"), expected.pop("embeddings")
  assert expected.items() <= found.items()
  assert [face["path"] for face in faces[0]] == [face["path"] for face in faces[1]]
  np.testing.assert_allclose(
    *([face["embedding"] for face in side] for side in faces), atol=2e-6
  )
