"""The faults of the tests' bucket server; storage's tests hold the rest."""

import pytest

from facedist import errors, storage
from tests import buckets


def test_a_fraction_of_requests_fails_in_every_way_by_the_seed():
  def draws(seed: int, order: range) -> dict[int, str | None]:
    faults = buckets.Faults()
    faults.rate(0.1, seed=seed)
    return {number: faults.draw("GET", f"gs://faces/{number}", "") for number in order}

  drawn = draws(1, range(2000))
  failed = [kind for kind in drawn.values() if kind is not None]
  assert 150 < len(failed) < 250
  assert set(failed) == set(buckets.KINDS)
  assert draws(1, range(1999, -1, -1)) == drawn  # whatever the order of the requests
  assert draws(2, range(2000)) != drawn


def test_a_repeated_request_succeeds_at_some_time():
  faults = buckets.Faults()
  faults.rate(0.5, seed=0)
  drawn = {faults.draw("GET", "gs://faces/a", "") is None for _ in range(20)}
  assert drawn == {True, False}


def test_a_range_past_the_end_is_refused(bucket: buckets.Bucket):
  storage.write_bytes(f"{bucket}/a", b"0123")
  with pytest.raises(errors.DataError, match="has 4 bytes"):
    storage.read_range(f"{bucket}/a", 4, 1)
  assert 416 in {one.status for one in bucket.traffic.exchanges}
