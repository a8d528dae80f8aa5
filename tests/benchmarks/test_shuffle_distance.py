"""Distances of neighbours: what is counted, and a picture of the same bytes."""

import numpy as np

from benchmarks import shuffle_distance
from facedist.data.samplers.block_sampler import BlockSampler
from facedist.data.samplers.epoch_sampler import Batch, EpochSampler


class ByTwos(EpochSampler):
  """Even records, then odd ones."""

  def samples_at(self, positions: np.ndarray) -> Batch:
    half = (self.num_records + 1) // 2
    records = np.where(positions < half, 2 * positions, 2 * (positions - half) + 1)
    return Batch(records, np.zeros_like(records))


def test_a_distance_is_what_lies_between_neighbours_on_disk():
  # The order is 0 2 4 6 1 3 5: 1 is 4 behind 0 and 3 behind 2.
  assert shuffle_distance.distances(ByTwos(7, 1, 0)).tolist() == [3, 3, 3, 4, 4, 4]


def test_the_picture_is_the_same_each_time(tmp_path):
  order = BlockSampler(500, 8, 0, shuffle_block=10, streams=4, window_blocks=2)
  curves = {"single records": np.arange(1, 500), "blocks": np.arange(1, 500)}
  curves["blocks"] = shuffle_distance.distances(order)
  pictures = []
  for name in ("a.png", "b.png"):
    shuffle_distance.draw(curves, str(tmp_path / name))
    pictures.append((tmp_path / name).read_bytes())
  assert pictures[0] == pictures[1]
