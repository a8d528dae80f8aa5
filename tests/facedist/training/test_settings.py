"""Flags that depend on others: their defaults, and what is refused together."""

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
from facedist.preflight import checks
from facedist.training import config as train_config
from facedist.training import optimizers
from facedist.training.config import TrainConfig, resolve


def settings(line: str = "") -> TrainConfig:
  """The configuration of a command line, with the defaults filled in."""
  values = flags.FlagValues()
  config.define_flags(TrainConfig, values)
  values(["train", *line.split()])
  return resolve(config.from_flags(TrainConfig, values))


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
  assert (found.sub_centres, found.scale) == (sub_centres, 64.0)
  assert head in MARGINS
  assert resolve(found) == found


@pytest.mark.parametrize(
  ("optimizer", "rate", "decay", "momentum", "betas", "epsilon"),
  [
    ("sgd", 0.1, 5e-4, 0.9, (None, None), None),
    ("adamw", 1e-3, 0.1, None, (0.9, 0.999), 1e-8),
    ("lamb", 5e-3, 0.01, None, (0.9, 0.999), 1e-6),
  ],
)
def test_an_optimizer_has_its_usual_hyperparameters_where_none_is_given(
  optimizer: str,
  rate: float,
  decay: float,
  momentum: float | None,
  betas: tuple[float | None, float | None],
  epsilon: float | None,
):
  found = settings(f"--optimizer={optimizer}")
  assert (found.head_rate, found.full_rate, found.weight_decay) == (rate, rate, decay)
  assert (found.momentum, found.epsilon) == (momentum, epsilon)
  assert (found.beta1, found.beta2) == betas
  assert optimizer in optimizers.OPTIMIZERS
  assert resolve(found) == found


def test_a_given_value_replaces_the_default_even_if_it_is_zero():
  found = settings("--head=combined --margin=1.2 --margin3=0 --sub_centres=2")
  assert (found.margin, found.margin2, found.margin3) == (1.2, 0.3, 0.0)
  assert found.sub_centres == 2
  assert train_config.margin_of(found) == Combined(1.2, 0.3, 0.0)
  found = settings("--momentum=0 --weight_decay=0 --full_rate=0.3 --scale=32")
  assert (found.momentum, found.weight_decay, found.scale) == (0.0, 0.0, 32.0)
  assert (found.head_rate, found.full_rate) == (0.1, 0.3)


def test_the_default_of_another_heads_flag_changes_nothing():
  assert settings("--norm_low=10 --head_momentum=0.99") == settings()


def test_a_batch_by_identities_has_a_quarter_of_its_size_of_them_by_default():
  assert settings("--sampler=identities --global_batch=16").identities_per_batch == 4


def test_a_sample_is_a_tenth_by_default():
  assert settings("--head_sharding=sampled").head_sample_rate == 0.1
  given = settings("--head_sharding=sampled --head_sample_rate=0.02")
  assert given.head_sample_rate == 0.02
  assert settings("--head_sharding=sharded").head_sample_rate is None


@pytest.mark.parametrize(
  ("line", "margin"),
  [
    (
      "--head=magface --norm_low=1 --norm_high=2 --norm_weight=3",
      MagFace(min_norm=1.0, max_norm=2.0, penalty_weight=3.0),
    ),
    (
      "--head=magface --margin=0.3 --margin2=0.7",
      MagFace(min_margin=0.3, max_margin=0.7),
    ),
    (
      "--head=adaface --norm_concentration=0.5 --head_momentum=0.9",
      AdaFace(concentration=0.5, momentum=0.9),
    ),
    ("--head=curricularface --head_momentum=0.9", CurricularFace(momentum=0.9)),
  ],
)
def test_the_flags_of_a_head_set_its_hyperparameters(line: str, margin: Margin):
  assert train_config.margin_of(settings(line)) == margin


def test_rates_grow_in_proportion_to_the_batch_they_are_given_for():
  found = settings("--head_rate=0.1 --full_rate=0.4 --rate_batch=256")
  assert train_config.peak_rates(found, global_batch=1024) == (0.4, 1.6)
  assert train_config.peak_rates(found, global_batch=128) == (0.05, 0.2)
  fixed = dataclasses.replace(found, rate_batch=0)
  assert train_config.peak_rates(fixed, global_batch=1024) == (0.1, 0.4)


ALONE = "--head=none --metric_loss=triplet_hard --embedding_size=16"
BY_IDENTITY = "--sampler=identities --global_batch=12 --identities_per_batch=3"


@pytest.mark.parametrize(
  ("line", "says"),
  [
    ("--head=arc", "--head=arc is not known -> choose one of adaface"),
    ("--margin2=0.1", "--margin2=0.1 does not belong to --head=cosface, which has --m"),
    ("--head=softmax --margin=0.1", "which has no margin -> leave it out"),
    ("--head=sphereface --margin=0.5", "give at least 1"),
    ("--head=magface --norm_low=110", "must be below --norm_high=110.0 -> lower the"),
    ("--norm_low=20", "--norm_low=20.0 does not belong to --head=cosface, which has"),
    ("--head=adaface --norm_high=90", "which has --margin, --norm_concentration,"),
    ("--head=softmax --norm_weight=1", "which has no margin -> leave it out"),
    ("--head=magface --norm_concentration=0.5", "does not belong to --head=magface"),
    ("--head=arcface --head_momentum=0.9", "does not belong to --head=arcface"),
    ("--head=none --head_momentum=0.9", "does not belong to --head=none"),
    ("--head_sample_rate=0.1", "belongs to --head_sharding=sampled, not replicated"),
    (
      "--head_sharding=sampled --head_sample_rate=0",
      "--head_sample_rate=0.0 leaves no other identities",
    ),
    ("--head=none", "leaves no loss to train with -> give"),
    (f"{ALONE} --margin=0.5", "does not belong to --head=none"),
    (f"{ALONE} --head_sharding=sharded", "--head=none has none"),
    (f"{ALONE} --metric_weight=0", "--metric_weight=0 leaves no loss to train with"),
    (f"{ALONE} --metric_margin=2.1", "more than 2, the largest distance of --metric_l"),
    ("--optimizer=adam", "--optimizer=adam is not known -> choose one of adamw, lamb"),
    ("--optimizer=adamw --momentum=0.9", "does not belong to --optimizer=adamw, which"),
    ("--beta2=0.99", "--beta2=0.99 does not belong to --optimizer=sgd, which has"),
    ("--optimizer=lamb --nesterov", "or take --optimizer=sgd"),
    (
      "--optimizer=lamb --head_sharding=sharded",
      "lamb does not update class weights row by row -> give --optimizer=sgd or adamw",
    ),
    ("--head_epochs=0 --full_epochs=0", "are both 0 -> train one"),
    ("--full_warmup_epochs=99", "more than the phase's 20 -> shorten it"),
    *(
      (f"--step_boundaries={text}", "must be rising fractions")
      for text in ("0.5,0.2", "0,0.5", "0.5,1", "half", "")
    ),
    (f"{BY_IDENTITY} --identities_per_batch=5", "try --global_batch=10"),
    (f"{BY_IDENTITY} --global_batch=3", "2 or more, of each"),
    (f"{BY_IDENTITY} --read_mode=stream", "take --read_mode=stage --shuffle_block=1"),
    (f"{BY_IDENTITY} --shuffle_block=256", "take --read_mode=stage --shuffle_block=1"),
    ("--identities_per_batch=7", "is for --sampler=identities alone -> give both"),
    ("--shuffle_block=8 --global_batch=100", "over --streams=64 -> try --global_batch"),
    ("--backbone=iresnet50", "there are none for --backbone=iresnet50 -> use --backbo"),
    ("--backbone_weights=gone.h5", "=gone.h5 is not a file -> give imagenet"),
    (f"--backbone_weights={__file__}", "has an unknown ending -> give"),
    ("--jit_compile=on --sync_batch_norm", "cannot compile the collectives of"),
  ],
)
def test_flags_that_do_not_go_together_are_refused(line: str, says: str):
  found = checks.attempt("flags", lambda: checks.check_flags(settings(line)))
  assert says in str(found)
  assert found.exit_code == errors.ExitCode.USAGE


@pytest.mark.parametrize(
  "line",
  [
    f"{ALONE} --metric_margin=2",
    "--metric_loss=triplet_semihard --metric_margin=4",
    "--metric_loss=triplet_semihard --metric_weight=0",
  ],
)
def test_a_metric_margin_may_be_as_large_as_the_largest_distance(line: str):
  assert checks.check_flags(settings(line)).state == checks.GOOD


def test_a_config_from_before_these_flags_is_the_same_run():
  new = {field.name for field in dataclasses.fields(train_config.HeadSettings)}
  new |= {"optimizer", "rate_batch", "beta1", "beta2", "epsilon"}
  old = json.loads(config.to_json(settings()))
  old = {name: value for name, value in old.items() if name not in new}
  old |= {"head": "cosface", "margin": 0.35, "scale": 64.0}
  read = config.from_json(TrainConfig, json.dumps(old), "config.json")
  assert config.conflicts(resolve(read), settings("--head=cosface")) == []
