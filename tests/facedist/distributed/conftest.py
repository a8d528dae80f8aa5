"""The addresses of a cluster on this machine."""

import pytest

from facedist.distributed.detect import free_addresses


@pytest.fixture
def workers() -> tuple[str, ...]:
  """Two addresses on loopback whose ports are free."""
  return free_addresses(2)
