"""A run that starts from another run's checkpoint."""

import dataclasses
import pathlib

import numpy as np
import pytest

from facedist import config as configs
from facedist import errors
from facedist.training import train_state
from facedist.training.checkpoint import checkpoints
from tests.facedist.training import steps
from tests.facedist.training.steps import build, one

CONFIG = dataclasses.replace(steps.SPECK, embedding_batch_norm=True)


def run_in(
  workdir: pathlib.Path, step: int = 10, *, broken: int | None = None
) -> train_state.TrainState:
  """Leaves the checkpoint of a fresh state, as a run would; NaN in a broken weight."""
  built = build(one(), CONFIG)
  built.network.embedding.layers[-1].beta.assign([step] * 8)
  if broken is not None:
    weight = built.network.backbone.weights[broken]
    weight.assign(np.full(weight.shape, np.nan))
  checkpoints.save(
    built.checkpoint(), str(workdir), step=step, is_chief=True, facts={"image_size": 32}
  )
  (workdir / "config.json").write_text(configs.to_json(CONFIG))
  return built


def started(
  source: pathlib.Path | str, *, identities: int = 5, **changes: object
) -> train_state.TrainState:
  run = dataclasses.replace(CONFIG, seed=1, backbone_weights=str(source), **changes)
  return build(one(), run, identities=identities)


def assert_same_backbone(
  left: train_state.TrainState, right: train_state.TrainState
) -> None:
  weights = (each.network.backbone.get_weights() for each in (left, right))
  for own, other in zip(*weights, strict=True):
    np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize(
  ("source", "step"),
  [
    ("", 20),  # the newest
    ("checkpoints/step-00000010", 10),
    ("checkpoints/step-00000010.json", 10),
    ("checkpoints/step-00000010.index", 10),
  ],
)
def test_a_run_gives_backbone_and_embedding_of_a_checkpoint(
  source: str, step: int, tmp_path: pathlib.Path
):
  before = [run_in(tmp_path, 10), run_in(tmp_path, 20)]
  built = started(f"{tmp_path}/{source}", identities=7)
  assert_same_backbone(built, before[0])
  assert built.network.embedding.layers[-1].beta.numpy().tolist() == [step] * 8
  assert built.step.numpy() == 0
  assert built.head.class_weights.shape[0] == 7  # the identities are this run's own


def test_an_embedding_layer_of_another_size_starts_at_random(tmp_path: pathlib.Path):
  before = run_in(tmp_path)
  built = started(tmp_path, embedding_size=4)
  assert_same_backbone(built, before)
  assert built.network.embedding.output_shape == (None, 4)


def test_a_run_of_another_backbone_is_refused(tmp_path: pathlib.Path):
  run_in(tmp_path)
  with pytest.raises(errors.UsageError, match="is of --backbone=speck, not vgg8"):
    started(tmp_path, backbone="vgg8")


def test_a_run_whose_weights_are_not_finite_is_refused_by_the_first_s_name(
  tmp_path: pathlib.Path,
):
  run_in(tmp_path, 1, broken=1)
  reason = r"step-00000001: conv2d\w*/bias has values that are not finite"
  with pytest.raises(errors.UsageError, match=reason):
    started(tmp_path)


def test_a_run_without_a_checkpoint_is_refused(tmp_path: pathlib.Path):
  (tmp_path / "config.json").write_text(configs.to_json(CONFIG))
  with pytest.raises(errors.UsageError, match="a run without a checkpoint"):
    started(tmp_path)


def test_a_file_of_keras_gives_the_backbone(tmp_path: pathlib.Path):
  source = build(one(), CONFIG)
  source.network.backbone.save_weights(str(tmp_path / "w.h5"))
  assert_same_backbone(started(tmp_path / "w.h5"), source)
