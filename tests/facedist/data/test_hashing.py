"""The hashes against published values and the statistics of random numbers."""

import numpy as np

from facedist.data import hashing


def test_mix_gives_the_published_splitmix64_sequence():
  # The first outputs for seed 1234567; the state grows by the golden gamma each time.
  states = [(1234567 + n * 0x9E3779B97F4A7C15) % 2**64 for n in range(5)]
  assert hashing.mix(np.array(states, np.uint64)).tolist() == [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
  ]


def test_combine_depends_on_every_part_and_on_their_order():
  one, two = np.array([1]), np.array([2])
  results = [
    hashing.combine(0, one, two),
    hashing.combine(0, two, one),
    hashing.combine(0, one, one),
    hashing.combine(1, one, two),
    hashing.combine(0, one),
  ]
  assert len({int(result[0]) for result in results}) == len(results)


def test_combine_broadcasts_its_parts():
  rows, columns = np.arange(3)[:, None], np.arange(2)
  grid = hashing.combine(7, rows, columns)
  assert grid.shape == (3, 2)
  assert grid[2, 1] == hashing.combine(7, np.array([2]), np.array([1]))[0]


def test_any_integer_is_a_seed():
  values = [hashing.combine(seed, np.array([0]))[0] for seed in (-1, 0, 2**64 + 5)]
  assert len(set(values)) == 3


def test_each_bit_is_set_half_of_the_time():
  hashed = hashing.combine(3, np.arange(10_000))
  bits = (hashed[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
  # Five standard deviations of a mean of 10,000 fair coins.
  np.testing.assert_allclose(bits.mean(axis=0), 0.5, atol=5 * 0.5 / 100)
