"""The hashes against published values."""

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
