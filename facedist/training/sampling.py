"""Which records make up which batch: the order that a run's flags ask for."""

from absl import logging

from facedist import errors
from facedist.data import block_order, identity_order
from facedist.data.order import Order
from facedist.data.record_reader import RecordReader
from facedist.training.config import TrainConfig

_IMAGES_OF_EACH = 4  # as in the batches of arXiv:1703.07737


def check(settings: TrainConfig) -> None:
  """Raises UsageError for flags that do not go with --sampler, or its numbers."""
  if settings.sampler != "identities":
    if settings.identities_per_batch is not None:
      raise errors.UsageError(
        f"--identities_per_batch={settings.identities_per_batch} is for "
        "--sampler=identities alone; give both or none."
      )
    if settings.shuffle_block > 1:
      block_order.check_streams(settings.global_batch, settings.streams)
    return
  identity_order.count_images(settings.global_batch, _identities(settings))
  if settings.read_mode == "stream" or settings.shuffle_block > 1:
    raise errors.UsageError(
      f"--read_mode={settings.read_mode} --shuffle_block={settings.shuffle_block} read "
      "neighbouring records together, and --sampler=identities picks single ones from "
      "everywhere; take --read_mode=stage --shuffle_block=1."
    )


def make_order(settings: TrainConfig, train_reader: RecordReader) -> Order:
  """Returns the order of a run over the records of its reader.

  Raises:
    errors.UsageError: The flags contradict each other or the data.
    errors.DataError: The labels cannot be read.
  """
  check(settings)
  if settings.sampler != "identities":
    return block_order.make_order(
      train_reader.num_records,
      settings.global_batch,
      settings.seed,
      shuffle_block=settings.shuffle_block,
      streams=settings.streams,
      window_blocks=settings.shuffle_window,
    )
  identities = identity_order.IdentityOrder(
    train_reader.num_records,
    settings.global_batch,
    settings.seed,
    _identities(settings),
    identity_order.group(train_reader.labels()),
  )
  logging.info(
    "sampler: %d identities x %d images a batch; each of %d identities comes once in "
    "%d steps",
    identities.identities_per_batch,
    identities.images_of_each,
    identities.groups.num_identities,
    identities.steps_a_round,
  )
  return identities


def _identities(settings: TrainConfig) -> int:
  """Returns how many identities a batch has."""
  if settings.identities_per_batch is None:
    return max(2, settings.global_batch // _IMAGES_OF_EACH)
  return settings.identities_per_batch
