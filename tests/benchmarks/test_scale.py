"""The simulated large sets hold what they say, and their costs are measured."""

import numpy as np

from benchmarks import scale
from facedist.data.readers import local_reader


def test_a_simulated_set_is_one_shard_under_many_names(tmp_path):
  scale.write_set(str(tmp_path), 60, records_a_shard=20, identities=200)
  opened = local_reader.open_reader(str(tmp_path), "train")
  assert opened.num_records == 60
  jpegs, labels = opened.read(np.array([3, 23, 43, 4]))
  assert jpegs[0] == jpegs[1] == jpegs[2] != jpegs[3]
  assert labels.tolist() == [3, 3, 3, 4]


def test_every_way_of_reading_is_measured(tmp_path, monkeypatch):
  monkeypatch.setattr(scale, "BATCHES", 2)
  scale.write_set(str(tmp_path), 1000, records_a_shard=100, identities=100)
  for name in scale.READERS:
    costs = scale.measure(name, str(tmp_path))
    assert costs.open_seconds > 0
    assert costs.order_ms > 0
    assert costs.read_ms > 0
    assert costs.read_mb >= costs.order_mb >= costs.open_mb >= 0
