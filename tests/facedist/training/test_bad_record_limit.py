"""The limit on damaged records: an epoch's count, the same on all workers."""

import json

import numpy as np
import pytest

from facedist import errors
from facedist.training import inputs, metrics


def new_limit() -> inputs.BadRecordLimit:
  return inputs.BadRecordLimit(3, records_per_epoch=100, global_batch=10)


def rows(*damaged: int) -> np.ndarray:
  """Returns steps with so many damaged records each."""
  values = np.zeros((len(damaged), len(metrics.COLUMNS)), np.float32)
  values[:, metrics.COLUMNS.index("damaged")] = damaged
  return values


def test_as_many_as_the_limit_pass_in_each_epoch_and_one_more_ends_the_run():
  limit = new_limit()
  for epoch in range(5):
    limit.add(rows(*[0] * 7, 2, 1, 0), first_step=10 * epoch)
  with pytest.raises(
    errors.DataError, match=r"4 damaged .*by step 49 of epoch 4 .*--max_bad_records=3"
  ):
    limit.add(rows(0, 0, 1), first_step=47)


def test_a_run_that_is_resumed_counts_on_from_its_checkpoint():
  limit = new_limit()
  limit.add(rows(*[0] * 10, 2, 0), first_step=0)
  state = json.loads(json.dumps(limit.state()))
  resumed = new_limit()
  resumed.restore(state)
  resumed.add(rows(1, 0), first_step=12)
  with pytest.raises(errors.DataError, match="4 damaged records by step 14 of epoch 1"):
    resumed.add(rows(1), first_step=14)
  resumed.restore(state)  # back to the checkpoint: what came after it did not happen
  resumed.add(rows(1), first_step=15)
  resumed.restore({})  # of a version that wrote none
  resumed.add(rows(3), first_step=16)
