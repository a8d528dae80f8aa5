"""Every flag that launch/slurm and docs/launch.md show exists."""

import dataclasses
import pathlib
import re

import pytest

from facedist import config, evaluate
from facedist.training.config import TrainConfig
from tfrecords_tools.builder import options

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = [ROOT / "docs" / "launch.md", *sorted((ROOT / "launch" / "slurm").iterdir())]
# Words of sbatch, srun, scontrol, docker and kubectl.
OTHERS = {
  *("array", "dependency", "distribution", "exclude", "export", "nodes"),
  *("ntasks", "oneliner", "output", "parsable", "requeue", "signal", "time", "wait"),
  *("for", "kustomize", "tag", "timeout"),
}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_flag_that_is_shown_exists(path: pathlib.Path):
  known = {"flagfile", "workers"} | OTHERS
  for settings in (
    TrainConfig,
    evaluate.EvaluateConfig,
    options.BuildConfig,
    config.CommonConfig,
  ):
    known |= {field.name for field in dataclasses.fields(settings)}
  found = re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)", path.read_text())
  assert found
  assert {name for name in found if "-" not in name} <= known  # ours have no dash
