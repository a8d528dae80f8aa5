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


def test_fields_that_may_change_are_written_again_and_others_are_refused_by_name(
  tmp_path: pathlib.Path,
):
  manager.claim_workdir(BASE, str(tmp_path), is_chief=True)
  changed = dataclasses.replace(BASE, log_every_steps=7)
  manager.claim_workdir(changed, str(tmp_path), is_chief=True)
  assert checkpoints.load_config(str(tmp_path)) == changed
  other = dataclasses.replace(BASE, margin=0.5, seed=3, log_every_steps=9)
  with pytest.raises(errors.ConfigError) as caught:
    manager.claim_workdir(other, str(tmp_path), is_chief=True)
  assert "seed: 0 -> 3" in str(caught.value)
  assert "margin: 0.35 -> 0.5" in str(caught.value)
  assert "log_every_steps" not in str(caught.value)
  assert checkpoints.load_config(str(tmp_path)) == changed


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
