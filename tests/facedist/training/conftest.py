"""The tests of training have a small backbone of their own, `--backbone=speck`."""

from collections.abc import Iterator
from unittest import mock

import pytest

from facedist.models.backbones import registry
from tests import speck


@pytest.fixture(scope="package", autouse=True)
def small_backbone() -> Iterator[None]:
  """Registers it for these tests alone."""
  with mock.patch.dict(registry.BACKBONES):
    speck.register()
    yield
