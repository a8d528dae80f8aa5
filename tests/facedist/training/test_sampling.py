"""The order that a run's flags ask for."""

import dataclasses
import logging
import pathlib

import numpy as np
import pytest

from facedist.data.readers import local_reader
from facedist.data.readers.record_reader import RecordReader
from facedist.data.samplers.block_sampler import BlockSampler
from facedist.data.samplers.epoch_sampler import EpochSampler
from facedist.data.samplers.identity_sampler import IdentitySampler
from facedist.training import inputs
from facedist.training.config import TrainConfig
from tests import noise_sets

IDENTITIES = TrainConfig(sampler="identities", global_batch=12, identities_per_batch=3)


@pytest.fixture
def train(tmp_path: pathlib.Path) -> RecordReader:
  noise_sets.write(tmp_path, identities=5, images=4, shards=2)
  return local_reader.open_reader(str(tmp_path), "train")


def test_the_sampler_is_the_one_that_the_flags_name(
  train: RecordReader, caplog: pytest.LogCaptureFixture
):
  plain = dataclasses.replace(
    IDENTITIES, sampler="records", identities_per_batch=None, streams=4
  )
  blocks = dataclasses.replace(plain, shuffle_block=2)
  assert type(inputs.make_sampler(plain, train)) is EpochSampler
  assert type(inputs.make_sampler(blocks, train)) is BlockSampler
  with caplog.at_level(logging.INFO, logger="absl"):
    made = inputs.make_sampler(IDENTITIES, train)
  assert isinstance(made, IdentitySampler)
  labels = train.labels()[made.batch_at(3).records]
  assert sorted(np.bincount(labels).tolist())[-3:] == [4, 4, 4]
  assert "3 identities x 4 images a batch; each of 5 identities" in caplog.text
