"""Every flagfile in configs/ is checked, and those of large backbones are tried."""

import pathlib

import pytest
from absl import flags

from facedist import config
from facedist.config import flags as config_flags
from facedist.distributed import cluster
from facedist.preflight import checks
from facedist.training.config import TrainConfig, resolve
from tests import processes

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.flags"))


def parse(*words: str) -> TrainConfig:
  values = flags.FlagValues()
  config.define_flags(TrainConfig, values)
  values(config_flags.expand(["train", *words], values))
  return config.from_flags(TrainConfig, values)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_made_of_flags_that_exist_and_keep_their_rules(
  path: pathlib.Path,
):
  parsed = parse(f"--flagfile={path}")
  assert parsed.data_dir is None, "a folder of somebody's machine is in the config"
  assert parsed.workdir is None
  found = checks.check_flags(resolve(parsed), cluster.Cluster())
  assert found.state != checks.BAD, found  # float16 without a GPU is a warning


# tests/launch/test_demo.py and tests/facedist/test_addons.py train those of the others,
# tests/facedist what else sets configs apart: heads, precisions, rates.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vggface2", "vggface2_sample_best"])
def test_a_config_of_a_large_backbone_trains_saves_restores_and_scores_in_a_dry_run(
  name: str,
):
  flags = (f"--flagfile={FOLDER / name}.flags", "--dry_run")
  result = processes.run("facedist.train", *flags, timeout=600)
  assert result.returncode == 0, result.stderr
  assert "resumed step-00000001" in result.stderr
  assert result.stderr.strip().endswith("the config works")
