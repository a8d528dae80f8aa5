"""What all tests share: two CPU devices, the real face data, a two-replica strategy."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

from facedist import storage  # this also quiets TensorFlow before anything imports it

if TYPE_CHECKING:
  import tensorflow as tf

  from tests import buckets

REAL_DATA = "FACEDIST_REAL_DATA"

# A busy machine is no failure.
hypothesis.settings.register_profile("facedist", deadline=None)
hypothesis.settings.load_profile("facedist")


def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  """Puts the files with slow tests first where several processes share the files.

  What is left for the end is then short, and the processes end together.
  """
  if config.getoption("dist", "no") != "no":
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish(session: pytest.Session) -> None:
  """Splits the CPU once the test modules are imported and before any test runs.

  A run whose tests need no TensorFlow does not pay for importing it; nor does one that
  starts no command pay for the process that commands are forked from.
  """
  if "tests.processes" in sys.modules:
    sys.modules["tests.processes"].start_server()
  wanted = any("two_replicas" in item.fixturenames for item in session.items)
  if wanted or "tensorflow" in sys.modules:
    _split_cpu()


@pytest.fixture(scope="session")
def two_replicas() -> tf.distribute.MirroredStrategy:
  """Two replicas on the two halves of the CPU.

  One for all tests: a second strategy would number its collectives from the start
  again, and TensorFlow refuses a number that had another shape before.
  """
  import tensorflow as tf

  return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
  """The folder of real faces that the environment names; skips where there is none."""
  folder = os.environ.get(REAL_DATA, "")
  if not os.path.isdir(folder):
    pytest.skip(f"{REAL_DATA}={folder} is not a folder; real faces are needed")
  return pathlib.Path(folder)


@pytest.fixture
def small_disk(
  request: pytest.FixtureRequest, tmp_path: pathlib.Path
) -> Iterator[pathlib.Path]:
  """A disk of 64 KiB, or of a size given indirectly; skips where it cannot be."""
  folder = tmp_path / "small"
  folder.mkdir()
  size = getattr(request, "param", "64k")
  command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
  if subprocess.run(command, capture_output=True, check=False).returncode:
    pytest.skip("a small file system needs the right to mount one")
  yield folder
  subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def _bucket_server() -> Iterator[buckets.Server]:
  """A server of Google Cloud Storage's interface, over HTTP on loopback."""
  from tests import buckets

  server = buckets.Server()
  server.start()
  yield server
  server.stop()


@pytest.fixture
def bucket(
  _bucket_server: buckets.Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[buckets.Bucket]:
  """An empty bucket, `gs://faces`; facedist.storage and child processes reach it.

  Its attribute `faults` lets requests fail, `traffic` counts them (tests/buckets.py).
  """
  from tests import buckets

  for name in list(os.environ):
    if name.startswith("FACEDIST_STORAGE_"):
      monkeypatch.delenv(name)
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", _bucket_server.endpoint)
  monkeypatch.setenv("FACEDIST_STORAGE_DEADLINE_SECONDS", "60")
  _bucket_server.clear()
  yield buckets.Bucket.at(_bucket_server, "faces")
  _bucket_server.clear()
  storage.close()


def _split_cpu() -> None:
  """Makes CPU:0 and CPU:1 of the one CPU, so that replica code is tested anywhere."""
  import tensorflow as tf

  (cpu,) = tf.config.list_physical_devices("CPU")
  halves = [tf.config.LogicalDeviceConfiguration()] * 2
  if tf.config.get_logical_device_configuration(cpu) != halves:
    tf.config.set_logical_device_configuration(cpu, halves)
