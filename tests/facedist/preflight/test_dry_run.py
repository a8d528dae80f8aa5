"""What a dry run refuses before it builds anything, and what it shortens."""

import dataclasses
import pathlib

import pytest

from facedist import errors, train
from facedist.models.backbones import registry
from facedist.preflight import dry_run
from facedist.training.config import TrainConfig


@pytest.fixture
def builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
  """Fails the test if a backbone is built."""

  def build(image_size: int) -> None:
    raise AssertionError("a network was built")

  for name, backbone in registry.BACKBONES.items():
    changed = dataclasses.replace(backbone, build=build)
    monkeypatch.setitem(registry.BACKBONES, name, changed)


def dry_run_of(strategy: str = "one", **changes: object) -> None:
  train.main(TrainConfig(dry_run=True, strategy=strategy, **changes))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"backbone_weights": "gone.h5"}, "=gone.h5 is not a file; give imagenet"),
    ({"full_warmup_epochs": 99.0}, "more than the phase's 20; shorten it"),
    ({"head": "none"}, "leaves no loss to train with; give"),
    ({"accumulate_steps": 3}, "does not divide a replica's batch of 512"),
  ],
)
@pytest.mark.usefixtures("builds_nothing")
def test_a_dry_run_refuses_what_a_real_start_refuses(
  changes: dict[str, object], message: str
):
  with pytest.raises(errors.FacedistError) as caught:
    dry_run_of(**changes)
  assert message in str(caught.value)
  assert caught.value.exit_code == errors.ExitCode.USAGE


def test_a_batch_that_does_not_divide_over_the_replicas_is_refused():
  with pytest.raises(errors.UsageError, match="=7 does not divide over 2 replicas"):
    dry_run.dry_run(TrainConfig(global_batch=7), 2, run=pytest.fail)


def test_the_shortened_config_uses_all_parts_of_the_given_one(tmp_path: pathlib.Path):
  given = TrainConfig(
    accumulate_steps=8,
    global_batch=64,
    sampler="identities",
    backbone_weights=str(tmp_path / "w.h5"),
  )
  short = dry_run.shortened(given, 2, str(tmp_path))
  assert (short.global_batch, short.accumulate_steps) == (8, 2)  # still in pieces
  assert short.identities_per_batch == 2
  assert short.rate_batch == 64  # the rates would be far too high for a batch of 8
  assert short.backbone_weights == given.backbone_weights
  short = dry_run.shortened(TrainConfig(), 1, str(tmp_path))
  assert short.backbone_weights == "none"  # ImageNet's are not downloaded
