"""The config.json of a workdir, and what a marker says of the data."""

import dataclasses
import pathlib

import pytest

from facedist import errors
from facedist.training import config as train_config
from facedist.training.checkpoint import checkpoints, manager
from tests import noise_sets

BASE = train_config.resolve(train_config.TrainConfig(data_dir="/data", workdir="/run"))


def test_the_chief_writes_the_config_and_others_do_not(tmp_path: pathlib.Path):
  manager.claim_workdir(BASE, str(tmp_path), is_chief=False)
  assert list(tmp_path.iterdir()) == []
  manager.claim_workdir(BASE, str(tmp_path), is_chief=True)
  assert checkpoints.load_config(str(tmp_path)) == BASE


def test_a_second_start_with_another_config_names_the_differing_fields(
  tmp_path: pathlib.Path,
):
  manager.claim_workdir(BASE, str(tmp_path), is_chief=True)
  other = dataclasses.replace(BASE, margin=0.5, seed=3, log_every_steps=7)
  with pytest.raises(errors.ConfigError) as caught:
    manager.claim_workdir(other, str(tmp_path), is_chief=True)
  assert "seed: 0 -> 3" in str(caught.value)
  assert "margin: 0.35 -> 0.5" in str(caught.value)
  assert "log_every_steps" not in str(caught.value)  # free to change
  assert checkpoints.load_config(str(tmp_path)) == BASE


def test_fields_that_may_change_are_written_again(tmp_path: pathlib.Path):
  manager.claim_workdir(BASE, str(tmp_path), is_chief=True)
  manager.claim_workdir(
    dataclasses.replace(BASE, log_every_steps=7), str(tmp_path), is_chief=True
  )
  assert checkpoints.load_config(str(tmp_path)).log_every_steps == 7


def test_a_corrupt_config_is_named(tmp_path: pathlib.Path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(errors.ConfigError, match=r"config\.json is not a TrainConfig"):
    manager.claim_workdir(BASE, str(tmp_path), is_chief=True)


def test_a_workdir_that_cannot_be_created_is_named(tmp_path: pathlib.Path):
  (tmp_path / "file").touch()
  with pytest.raises(errors.UsageError, match="cannot be written"):
    manager.claim_workdir(BASE, str(tmp_path / "file" / "run"), is_chief=True)


def test_the_facts_of_the_data_have_the_manifest_s_alignment_template(
  tmp_path: pathlib.Path,
):
  drawn = noise_sets.write(tmp_path, identities=2, images=1, size=32)
  assert manager.data_facts(drawn)["alignment"] is None
  aligned = dataclasses.replace(drawn, alignment={"template": "arcface", "images": {}})
  assert manager.data_facts(aligned) == {
    "image_size": 32,
    "num_identities": 2,
    "data_fingerprint": drawn.fingerprint,
    "alignment": "arcface",
  }
