"""Every flagfile in configs/ is parsed and run with --dry_run."""

import pathlib

import pytest
from absl import flags

from facedist import config
from facedist.training.config import TrainConfig
from tests import processes

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.flags"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_made_of_flags_that_exist_and_keep_their_rules(
  path: pathlib.Path,
):
  values = flags.FlagValues()
  config.define_flags(TrainConfig, values)
  flags.DEFINE_string("flagfile", "", "", flag_values=values)
  flags.DEFINE_string("undefok", "", "", flag_values=values)
  values(["train", f"--flagfile={path}"])
  parsed = config.from_flags(TrainConfig, values)
  assert parsed.data_dir is None, "a folder of somebody's machine is in the config"
  assert parsed.workdir is None


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains_saves_restores_and_scores_in_a_dry_run(path: pathlib.Path):
  result = processes.run(
    "facedist.train", f"--flagfile={path}", "--dry_run", timeout=600
  )
  assert result.returncode == 0, result.stderr
  assert "resumed step-00000001" in result.stderr
  assert result.stderr.strip().endswith("the config works")
