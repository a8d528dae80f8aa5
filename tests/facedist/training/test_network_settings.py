"""Settings of the network in the training step: whose statistics, which layers."""

import dataclasses

import numpy as np
import tensorflow as tf

from facedist.training import train_state
from tests.facedist.training.steps import build, column, one
from tests.facedist.training.test_train_step import CONFIG, train

SYNC = dataclasses.replace(CONFIG, backbone="vgg8", sync_batch_norm=True, dropout=0.0)


def test_synchronised_batch_norm_on_two_replicas_is_that_of_one(
  two_replicas: tf.distribute.MirroredStrategy,
):
  rows_of_one, alone, _ = train(one(), run=SYNC, num_steps=1)
  rows_of_two, two, _ = train(two_replicas, run=SYNC, num_steps=1)
  np.testing.assert_allclose(rows_of_one[:, :-1], rows_of_two[:, :-1], rtol=1e-4)
  for left, right in zip(weights(alone), weights(two), strict=True):
    np.testing.assert_allclose(left.numpy(), right.numpy(), rtol=1e-3, atol=1e-4)


def test_without_it_each_replica_has_its_own_statistics(
  two_replicas: tf.distribute.MirroredStrategy,
):
  own = dataclasses.replace(SYNC, sync_batch_norm=False)
  rows_of_one, _, _ = train(one(), run=own, num_steps=1)
  rows_of_two, _, _ = train(two_replicas, run=own, num_steps=1)
  losses = [column(rows, "loss") for rows in (rows_of_one, rows_of_two)]
  assert not np.allclose(*losses, rtol=1e-3)


def test_synchronised_batch_norm_normalises_as_the_fused_one_on_one_replica():
  own = dataclasses.replace(SYNC, sync_batch_norm=False)
  fused, _, _ = train(one(), run=own, num_steps=1)
  synced, _, _ = train(one(), run=SYNC, num_steps=1)
  np.testing.assert_allclose(fused[:, :-1], synced[:, :-1], rtol=1e-3)


def test_a_step_leaves_frozen_layers_as_they_are():
  run = dataclasses.replace(SYNC, freeze_until="block2_conv1_bn")
  _, trained, _ = train(one(), run=run, num_steps=1)
  fresh = build(one(), run)
  names = [layer.name for layer in fresh.network.backbone.layers]
  last = names.index("block2_conv1_bn")
  for number, (before, after) in enumerate(
    zip(fresh.network.backbone.layers, trained.network.backbone.layers, strict=True)
  ):
    for old, new in zip(before.get_weights(), after.get_weights(), strict=True):
      # a bias before batch norm has no gradient but rounding
      if number <= last or old.ndim > 1:
        assert np.array_equal(old, new) == (number <= last), before.name


def weights(built: train_state.TrainState) -> list[tf.Variable]:
  """Everything of the network, batch norm's averages too."""
  return [*built.network.backbone.weights, *built.network.embedding.weights]
