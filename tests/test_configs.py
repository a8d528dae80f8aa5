"""Every flagfile in configs/ is checked, and each backbone's first one is tried."""

import pathlib

import pytest
from absl import flags

from facedist import config
from facedist.distributed import cluster
from facedist.preflight import checks
from facedist.training.config import TrainConfig, resolve
from tests import processes

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.flags"))


def parse(path: pathlib.Path) -> TrainConfig:
  values = flags.FlagValues()
  config.define_flags(TrainConfig, values)
  flags.DEFINE_string("flagfile", "", "", flag_values=values)
  flags.DEFINE_string("undefok", "", "", flag_values=values)
  values(["train", f"--flagfile={path}"])
  return config.from_flags(TrainConfig, values)


# What else sets configs apart (heads, precisions, rates) is trained in tests/facedist.
FIRST_OF_BACKBONE = {parse(path).backbone: path for path in reversed(CONFIGS)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_made_of_flags_that_exist_and_keep_their_rules(
  path: pathlib.Path,
):
  parsed = parse(path)
  assert parsed.data_dir is None, "a folder of somebody's machine is in the config"
  assert parsed.workdir is None
  found = checks.check_flags(resolve(parsed), cluster.Cluster())
  assert found.state != checks.BAD, found  # float16 without a GPU is a warning


@pytest.mark.slow
@pytest.mark.parametrize("backbone", sorted(FIRST_OF_BACKBONE))
def test_a_config_of_each_backbone_trains_saves_restores_and_scores_in_a_dry_run(
  backbone: str,
):
  result = processes.run(
    "facedist.train",
    f"--flagfile={FIRST_OF_BACKBONE[backbone]}",
    "--dry_run",
    timeout=600,
  )
  assert result.returncode == 0, result.stderr
  assert "resumed step-00000001" in result.stderr
  assert result.stderr.strip().endswith("the config works")
