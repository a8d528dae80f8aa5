import dataclasses
import json

import pytest
from absl import flags

from facedist import config, errors
from facedist.training import config as train_config
from facedist.training import optimizers
from facedist.training.config import TrainConfig, resolve


def settings(*arguments: str) -> TrainConfig:
  """The configuration of this command line, filled in."""
  values = flags.FlagValues()
  config.define_flags(TrainConfig, values)
  values(["train", *arguments])
  return resolve(config.from_flags(TrainConfig, values))


@pytest.mark.parametrize(
  ("optimizer", "rate", "decay", "momentum", "beta1", "beta2", "epsilon"),
  [
    ("sgd", 0.1, 5e-4, 0.9, None, None, None),
    ("adamw", 1e-3, 0.1, None, 0.9, 0.999, 1e-8),
    ("lamb", 5e-3, 0.01, None, 0.9, 0.999, 1e-6),
  ],
)
def test_an_optimizer_has_its_usual_numbers_where_none_is_given(
  optimizer: str,
  rate: float,
  decay: float,
  momentum: float | None,
  beta1: float | None,
  beta2: float | None,
  epsilon: float | None,
):
  found = settings(f"--optimizer={optimizer}")
  assert (found.head_rate, found.full_rate, found.weight_decay) == (rate, rate, decay)
  assert found.momentum == momentum
  assert (found.beta1, found.beta2, found.epsilon) == (beta1, beta2, epsilon)
  assert resolve(found) == found


def test_every_optimizer_has_its_builder():
  assert set(train_config.DEFAULTS) == set(optimizers.OPTIMIZERS)


def test_what_is_given_wins_zero_too():
  found = settings("--momentum=0", "--weight_decay=0", "--full_rate=0.3")
  assert (found.momentum, found.weight_decay) == (0.0, 0.0)
  assert (found.head_rate, found.full_rate) == (0.1, 0.3)


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (("--optimizer=adam",), "--optimizer=adam is not known; choose one of adamw, lamb"),
    (
      ("--optimizer=adamw", "--momentum=0.9"),
      "--momentum=0.9 does not belong to --optimizer=adamw, which has --head_rate",
    ),
    (("--beta2=0.99",), "--beta2=0.99 does not belong to --optimizer=sgd, which has"),
    (("--optimizer=lamb", "--nesterov"), "or take --optimizer=sgd"),
    (
      ("--optimizer=lamb", "--head_sharding=sharded"),
      "lamb does not update class weights row by row; give --optimizer=sgd or adamw",
    ),
  ],
)
def test_numbers_that_make_no_sense_are_refused(arguments: tuple[str, ...], says: str):
  with pytest.raises(errors.UsageError, match=says):
    settings(*arguments)


def test_rates_grow_in_proportion_to_the_batch_they_are_given_for():
  found = settings("--head_rate=0.1", "--full_rate=0.4", "--rate_batch=256")
  rates = train_config.peak_rates
  assert rates(found, global_batch=1024) == (0.4, 1.6)
  assert rates(found, global_batch=128) == (0.05, 0.2)
  fixed = dataclasses.replace(found, rate_batch=0)
  assert rates(fixed, global_batch=1024) == (0.1, 0.4)


def test_a_config_of_before_these_flags_is_the_same_run():
  old = json.loads(config.to_json(TrainConfig()))
  for name in ("optimizer", "rate_batch", "beta1", "beta2", "epsilon"):
    del old[name]
  old |= {"head_rate": 0.1, "full_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
  read = config.from_json(TrainConfig, json.dumps(old), "config.json")
  assert config.conflicts(resolve(read), settings()) == []
