"""The moving average of the weights: by hand, on two replicas, and read back."""

import dataclasses
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from facedist import config as configs
from facedist import storage
from facedist.training import ema, inference, train_state
from facedist.training.checkpoint import checkpoints
from facedist.training.config import resolve
from tests.facedist.training import steps

RUN = dataclasses.replace(steps.SPECK, ema_decay=0.25, workdir="/runs/a")
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(
  ("step", "decay"), [(0, 0.1), (8, 0.5), (89, 90 / 99), (10**6, 0.999)]
)
def test_the_decay_rises_with_the_steps_up_to_its_own(step: int, decay: float):
  found = ema.decay_at(tf.constant(step, tf.int64), decay=0.999)
  np.testing.assert_allclose(found, decay, rtol=1e-6)


def test_averages_follow_weights_and_batch_statistics_on_every_replica(
  two_halves: tf.distribute.Strategy,
):
  run = dataclasses.replace(
    steps.SPECK, embedding_batch_norm=True, policy="mixed_float16", ema_decay=0.9
  )
  built = steps.build(two_halves, run)
  train_on = steps.trainer(two_halves, built, run)
  average = built.average
  assert average is not None
  network = built.network
  weights = [*network.backbone.weights, *network.embedding.weights]
  expected = [weight.numpy() for weight in weights]
  for wanted, own in zip(expected, average.averages, strict=True):
    np.testing.assert_array_equal(own.numpy(), wanted)  # as step 0 saves them
  for decay in (1 / 10, 2 / 11):  # it rises with the steps
    train_on(1)
    for number, weight in enumerate(weights):
      expected[number] = decay * expected[number] + (1 - decay) * weight.numpy()
  for wanted, own in zip(expected, average.averages, strict=True):
    np.testing.assert_allclose(own.numpy(), wanted, rtol=1e-5, atol=1e-6)
  for own in average.mirrored:
    left, right = two_halves.experimental_local_results(own)
    np.testing.assert_array_equal(left.numpy(), right.numpy())
  assert len(average.mirrored) == len(built.network.trainable_variables)
  # so that they are compared, too
  names = {id(each) for each in built.mirrored_variables}
  assert {id(own) for own in average.mirrored} <= names


def test_a_reader_takes_the_average_where_there_is_one_unless_told_otherwise(
  tmp_path: pathlib.Path,
):
  built = train_state.build(resolve(RUN), image_size=32, num_identities=3)
  assert built.average is not None
  trained = built.network.embed(IMAGES).numpy()
  weights = ema.weights(built.network)
  for own, weight in zip(built.average.averages, weights, strict=True):
    own.assign(0.5 * weight if weight.trainable else weight)
  storage.write_bytes(str(tmp_path / "config.json"), configs.to_json(RUN).encode())
  checkpoints.save(
    built.checkpoint(), str(tmp_path), step=7, is_chief=True, facts={"image_size": 32}
  )
  for own, weight in zip(built.average.averages, weights, strict=True):
    weight.assign(own)
  averaged = built.network.embed(IMAGES).numpy()
  assert not np.allclose(averaged, trained)
  for wanted, expected, found_weights, name in [
    ("auto", averaged, "ema", "speck-8@step-00000007-ema"),
    ("ema", averaged, "ema", "speck-8@step-00000007-ema"),
    ("trained", trained, "trained", "speck-8@step-00000007"),
  ]:
    found = inference.load_network(
      str(tmp_path), checkpoints.at(str(tmp_path), 7), weights=wanted
    )
    np.testing.assert_allclose(found.embed(IMAGES), expected, rtol=1e-5, atol=1e-6)
    assert (found.weights, found.name) == (found_weights, name)
