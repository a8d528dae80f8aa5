"""The order in which shards are prefetched follows the sampler."""

import itertools

import numpy as np

from facedist.data.cache import prefetch
from facedist.data.samplers import block_sampler, epoch_sampler

FIRST_IDS = np.array([0, 10, 20, 35, 50])


def test_a_range_of_steps_names_its_shards_in_the_order_of_first_need():
  sample_order = epoch_sampler.EpochSampler(50, 4, seed=1)
  plan = prefetch.prefetch_order(
    sample_order, FIRST_IDS, start_step=3, worker=1, num_workers=2
  )
  steps, following = itertools.islice(plan, 2)
  assert (steps.first_step, steps.end_step, steps.samples) == (3, 259, 512)
  assert following.first_step == 259
  expected = []
  for step in range(3, 259):
    for record in sample_order.batch_at(step).records[2:]:  # worker 1's half
      shard = next(n for n in range(4) if record < FIRST_IDS[n + 1])
      if shard not in expected:
        expected.append(shard)
  assert list(steps.shards) == expected
  assert [shard - 5 for shard in steps.moved(5).shards] == expected


def test_a_range_has_one_step_at_least():
  sample_order = epoch_sampler.EpochSampler(50, 4096, seed=1)
  plan = prefetch.prefetch_order(
    sample_order, FIRST_IDS, start_step=7, worker=0, num_workers=1
  )
  found = [(each.first_step, each.end_step) for each in itertools.islice(plan, 2)]
  assert found == [(7, 8), (8, 9)]


def test_count_fetched_equals_a_count_by_hand():
  plan = [
    prefetch.StepRange(step, step + 1, 10, shards)
    for step, shards in enumerate([(0, 1), (1, 2), (0,), (2, 0)])
  ]
  sizes = [100, 10, 1]
  # all fit: each is fetched once
  assert prefetch.count_fetched(plan, sizes, room=111) == (111, 40)
  # 0 makes room for 2, then 1 and 2 for 0, then 0 and 2 stay
  assert prefetch.count_fetched(plan, sizes, room=101) == (100 + 10 + 1 + 100, 40)


def test_shards_are_fetched_about_once_for_blocks_and_often_for_single_records():
  first_ids = np.arange(0, 20_001, 100)  # 200 shards
  sizes = [1] * 200
  orders = {
    "blocks": block_sampler.make_block_sampler(
      20_000, 64, 0, shuffle_block=100, streams=4, window_blocks=4
    ),
    "records": epoch_sampler.EpochSampler(20_000, 64, 0),
  }
  traffic = {}
  for name, each in orders.items():
    plan = prefetch.prefetch_order(
      each, first_ids, start_step=0, worker=0, num_workers=1
    )
    epoch = itertools.takewhile(lambda steps: steps.first_step * 64 < 20_000, plan)
    traffic[name], _ = prefetch.count_fetched(epoch, sizes, room=60)
  assert traffic["blocks"] < 2.5 * 200  # a block lies in two shards
  assert traffic["records"] > 5 * 200
