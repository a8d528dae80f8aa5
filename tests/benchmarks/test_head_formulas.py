"""A head's costs by formula, against small cases counted by hand."""

import dataclasses

import pytest

from benchmarks import head_formulas
from benchmarks.head_formulas import Job

SMALL = Job(
  "replicated",
  identities=100,
  embedding=10,
  global_batch=8,
  replicas=4,
  network_parameters=50,
)


def case(sharding: str, **more) -> Job:
  return dataclasses.replace(SMALL, sharding=sharding, **more)


@pytest.mark.parametrize(
  ("sharding", "rows", "step_rows", "compared"),
  [
    ("replicated", 100, 100, 2),
    ("sharded", 25, 25, 8),
    # a tenth of 25, and nine tenths of the two labels that fall to the replica
    ("sampled", 25, 4.3, 8),
  ],
)
def test_a_replica_has_a_part_of_the_rows_and_compares_with_those_of_the_step(
  sharding: str, rows: int, step_rows: float, compared: int
):
  job = case(sharding)
  assert job.rows == rows
  assert job.step_rows == pytest.approx(step_rows)
  assert job.compared == compared
  adds = 3 * compared * step_rows * 10
  assert head_formulas.multiply_adds(job) == pytest.approx(adds)
  assert case("sharded", identities=101).rows == 26  # rounded up


def test_class_weights_and_slots_take_four_bytes_a_float():
  assert head_formulas.state_bytes(case("replicated")) == 4 * 100 * 10 * 2
  assert head_formulas.state_bytes(case("sharded")) == 4 * 25 * 10 * 2
  assert head_formulas.state_bytes(case("sharded", slots=2)) == 4 * 25 * 10 * 3


@pytest.mark.parametrize(
  ("sharding", "expected"),
  [
    # a ring of four: each sends one and a half times what is summed
    ("replicated", 1.5 * 4 * (50 + 100 * 10)),
    ("sharded", 1.5 * (4 * 50 + 8 * (2 * 4 * 12 + 48))),
    ("sampled", 1.5 * (4 * 50 + 8 * (2 * 4 * 12 + 48))),
  ],
)
def test_what_is_sent_grows_with_identities_only_where_all_have_them(
  sharding: str, expected: float
):
  assert head_formulas.sent_bytes(case(sharding)) == pytest.approx(expected)
  more = head_formulas.sent_bytes(case(sharding, identities=1000))
  assert (more > expected) == (sharding == "replicated")


def test_one_replica_sends_nothing():
  assert head_formulas.sent_bytes(case("sharded", replicas=1)) == 0


def test_twice_the_replicas_halve_the_memory_of_rows_and_of_logits():
  one, two = (
    head_formulas.memory_bytes(case("sharded", replicas=number, identities=10**6))
    for number in (1, 2)
  )
  assert two == one / 2


def test_every_cluster_is_predicted_for_every_way_of_sharding():
  found = head_formulas.predictions()
  assert len(found) == 27
  clusters = {(job.replicas, job.global_batch) for job in found}
  assert clusters == {(8, 512), (64, 4096), (512, 32_768)}
