import dataclasses
import json

import pytest
from absl import flags

from facedist import config, errors
from facedist.models.heads.margins import (
  MARGINS,
  AdaFace,
  Combined,
  CurricularFace,
  MagFace,
  Margin,
)
from facedist.training import config as train_config
from facedist.training.config import TrainConfig


def settings(*arguments: str) -> TrainConfig:
  """The configuration of this command line, with the defaults filled in."""
  values = flags.FlagValues()
  config.define_flags(TrainConfig, values)
  values(["train", *arguments])
  return train_config.with_default_margins(config.from_flags(TrainConfig, values))


@pytest.mark.parametrize(
  ("head", "margins", "sub_centres"),
  [
    ("softmax", (None, None, None), 1),
    ("sphereface", (1.35, None, None), 1),
    ("cosface", (0.35, None, None), 1),
    ("arcface", (0.5, None, None), 1),
    ("combined", (1.0, 0.3, 0.2), 1),
    ("curricularface", (0.5, None, None), 1),
    ("adaface", (0.4, None, None), 1),
    ("magface", (0.45, 0.8, None), 1),
    ("subcentre_arcface", (0.5, None, None), 3),
  ],
)
def test_a_head_has_its_papers_margins_where_none_is_given(
  head: str, margins: tuple[float | None, ...], sub_centres: int
):
  found = settings(f"--head={head}")
  assert (found.margin, found.margin2, found.margin3) == margins
  assert found.sub_centres == sub_centres
  assert found.scale == 64.0
  assert head in MARGINS
  assert train_config.with_default_margins(found) == found


def test_a_given_value_replaces_the_default_even_if_it_is_zero():
  found = settings(
    "--head=combined", "--margin=1.2", "--margin3=0", "--sub_centres=2", "--scale=32"
  )
  assert (found.margin, found.margin2, found.margin3) == (1.2, 0.3, 0.0)
  assert found.sub_centres == 2
  assert train_config.margin_of(found) == Combined(1.2, 0.3, 0.0)
  assert found.scale == 32.0


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (("--head=arc",), "--head=arc is not known; choose one of adaface"),
    (
      ("--margin2=0.1",),
      "--margin2=0.1 does not belong to --head=cosface, which has --margin",
    ),
    (("--head=softmax", "--margin=0.1"), "which has no margin; leave it out"),
    (("--head=sphereface", "--margin=0.5"), "give at least 1"),
    (
      ("--head=magface", "--norm_low=110"),
      "must be below --norm_high=110.0; lower the first or raise the second",
    ),
    (
      ("--norm_low=20",),
      "--norm_low=20.0 does not belong to --head=cosface, which has --ma",
    ),
    (("--head=adaface", "--norm_high=90"), "which has --margin, --norm_concentration,"),
    (("--head=softmax", "--norm_weight=1"), "which has no margin; leave it out"),
    (
      ("--head=magface", "--norm_concentration=0.5"),
      "does not belong to --head=magface",
    ),
    (("--head=arcface", "--head_momentum=0.9"), "does not belong to --head=arcface"),
    (("--head=none", "--head_momentum=0.9"), "does not belong to --head=none"),
    (
      ("--head_sample_rate=0.1",),
      "--head_sample_rate=0.1 belongs to --head_sharding=sampled, not replicated",
    ),
    (
      ("--head_sharding=sampled", "--head_sample_rate=0"),
      "--head_sample_rate=0.0 leaves no other identities",
    ),
  ],
)
def test_hyperparameters_that_make_no_sense_are_refused(
  arguments: tuple[str, ...], says: str
):
  with pytest.raises(errors.UsageError, match=says):
    settings(*arguments)


@pytest.mark.parametrize(
  ("arguments", "margin"),
  [
    (
      ("--head=magface", "--norm_low=1", "--norm_high=2", "--norm_weight=3"),
      MagFace(min_norm=1.0, max_norm=2.0, penalty_weight=3.0),
    ),
    (
      ("--head=magface", "--margin=0.3", "--margin2=0.7"),
      MagFace(min_margin=0.3, max_margin=0.7),
    ),
    (
      ("--head=adaface", "--norm_concentration=0.5", "--head_momentum=0.9"),
      AdaFace(concentration=0.5, momentum=0.9),
    ),
    (("--head=curricularface", "--head_momentum=0.9"), CurricularFace(momentum=0.9)),
  ],
)
def test_the_flags_of_a_head_set_its_hyperparameters(
  arguments: tuple[str, ...], margin: Margin
):
  assert train_config.margin_of(settings(*arguments)) == margin


def test_the_default_of_another_heads_flag_changes_nothing():
  assert settings("--norm_low=10", "--head_momentum=0.99") == settings()


def test_a_sample_is_a_tenth_by_default():
  assert settings("--head_sharding=sampled").head_sample_rate == 0.1
  given = settings("--head_sharding=sampled", "--head_sample_rate=0.02")
  assert given.head_sample_rate == 0.02
  assert settings("--head_sharding=sharded").head_sample_rate is None


def test_a_config_from_before_these_flags_is_the_same_run():
  new = {field.name for field in dataclasses.fields(train_config.HeadSettings)}
  old = json.loads(config.to_json(TrainConfig()))
  old = {name: value for name, value in old.items() if name not in new}
  old |= {"head": "cosface", "margin": 0.35, "scale": 64.0}
  read = config.from_json(TrainConfig, json.dumps(old), "config.json")
  filled = train_config.with_default_margins(read)
  assert config.conflicts(filled, settings("--head=cosface")) == []
