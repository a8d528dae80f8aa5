"""The tests of training have a small backbone of their own, `--backbone=speck`."""

import pathlib
import resource
import tempfile
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import tensorflow as tf

from facedist.models.backbones import registry
from tests import speck


@pytest.fixture(scope="package", autouse=True)
def small_backbone() -> Iterator[None]:
  """Registers it for these tests alone."""
  with mock.patch.dict(registry.BACKBONES):
    speck.register()
    yield


@pytest.fixture
def two_halves() -> tf.distribute.Strategy:
  """Two replicas that reduce without collectives, whose keys outlive a strategy.

  A second strategy on the same devices takes the first one's keys, and TensorFlow
  refuses tensors of another shape under them; a head has shapes of its own.
  """
  reduction = tf.distribute.ReductionToOneDevice()
  return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=reduction)


@pytest.fixture(params=["disk", "bucket"])
def workdir(request: pytest.FixtureRequest, tmp_path: pathlib.Path, bucket: str) -> str:
  """A run's folder, which does not exist yet, on a disk and in a bucket."""
  return str(tmp_path / "run") if request.param == "disk" else f"{bucket}/run"


@pytest.fixture
def temporary_folder(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
  """The folder for temporary files, for this test alone."""
  (tmp_path / "tmp").mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
  return tmp_path / "tmp"


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
  """Sets how many bytes a file may have, as on a full disk; -1 ends the limit."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
