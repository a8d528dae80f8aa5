"""A run that starts from another run's checkpoint."""

import dataclasses
import pathlib

import numpy as np
import pytest

from facedist import config as configs
from facedist import errors, storage
from facedist.training import config as train_config
from facedist.training import train_state
from facedist.training.checkpoint import checkpoints
from facedist.training.config import resolve

CONFIG = train_config.TrainConfig(
  backbone="tinynet", backbone_weights="none", embedding_size=8
)


def run_in(
  workdir: str, *, step: int = 10, broken: int | None = None
) -> train_state.TrainState:
  """Leaves the checkpoint of a fresh state, as a run would; NaN in a broken weight."""
  built = train_state.build(resolve(CONFIG), image_size=32, num_identities=3)
  built.network.embedding.layers[-1].beta.assign([step] * 8)
  if broken is not None:
    weight = built.network.backbone.weights[broken]
    weight.assign(np.full(weight.shape, np.nan))
  checkpoints.save(
    built.checkpoint(), workdir, step=step, is_chief=True, facts={"image_size": 32}
  )
  text = configs.to_json(CONFIG)
  storage.write_bytes(storage.join(workdir, "config.json"), text.encode())
  return built


def started(source: str, **changes: object) -> train_state.TrainState:
  fresh = dataclasses.replace(CONFIG, seed=1, backbone_weights=source, **changes)
  return train_state.build(resolve(fresh), image_size=32, num_identities=5)


def assert_same(left: list[np.ndarray], right: list[np.ndarray]) -> None:
  for one, other in zip(left, right, strict=True):
    np.testing.assert_array_equal(one, other)


def test_a_workdir_gives_backbone_and_embedding_of_its_newest_checkpoint(
  tmp_path: pathlib.Path,
):
  run_in(str(tmp_path), step=10)
  last = run_in(str(tmp_path), step=20)
  built = started(f"{tmp_path}/")
  assert_same(built.network.backbone.get_weights(), last.network.backbone.get_weights())
  assert_same(
    built.network.embedding.get_weights(), last.network.embedding.get_weights()
  )
  assert built.step.numpy() == 0
  assert built.head.centres.shape[0] == 5  # the identities are this run's own


@pytest.mark.parametrize("ending", ["", ".json", ".index"])
def test_the_path_of_a_step_gives_the_weights_of_that_step(
  ending: str, tmp_path: pathlib.Path
):
  run_in(str(tmp_path), step=10)
  run_in(str(tmp_path), step=20)
  built = started(f"{tmp_path}/checkpoints/step-00000010{ending}")
  assert built.network.embedding.layers[-1].beta.numpy().tolist() == [10.0] * 8


def test_an_embedding_layer_of_another_size_starts_at_random(tmp_path: pathlib.Path):
  before = run_in(str(tmp_path))
  built = started(str(tmp_path), embedding_size=4)
  assert_same(
    built.network.backbone.get_weights(), before.network.backbone.get_weights()
  )
  assert built.network.embedding.output_shape == (None, 4)


def test_a_run_of_another_backbone_is_refused(tmp_path: pathlib.Path):
  run_in(str(tmp_path))
  with pytest.raises(errors.UsageError, match="is of --backbone=tinynet, not vgg8"):
    started(str(tmp_path), backbone="vgg8")


def test_a_run_whose_weights_are_not_finite_is_refused_by_the_first_s_name(
  tmp_path: pathlib.Path,
):
  built = run_in(str(tmp_path), step=1, broken=4)
  broken = built.network.backbone.weights[4]
  reason = rf"step-00000001: {broken.name.split(':')[0]} has values that are not finite"
  with pytest.raises(errors.UsageError, match=reason):
    started(str(tmp_path))


def test_a_run_without_a_checkpoint_is_refused(tmp_path: pathlib.Path):
  (tmp_path / "config.json").write_text(configs.to_json(CONFIG))
  with pytest.raises(errors.UsageError, match="a run without a checkpoint"):
    started(str(tmp_path))


def test_a_file_of_keras_is_taken_as_before(tmp_path: pathlib.Path):
  source = train_state.build(resolve(CONFIG), image_size=32, num_identities=3).network
  source.backbone.save_weights(str(tmp_path / "w.h5"))
  built = train_state.build(
    resolve(dataclasses.replace(CONFIG, seed=1)), image_size=32, num_identities=3
  ).network
  run = dataclasses.replace(CONFIG, backbone_weights=str(tmp_path / "w.h5"))
  train_state.load_starting_weights(built, run)
  assert_same(built.backbone.get_weights(), source.backbone.get_weights())
