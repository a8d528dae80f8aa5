"""What is found of devices, and of a batch on them."""

import ctypes
import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import tensorflow as tf

from facedist import doctor, errors
from facedist.data.shards import manifest
from facedist.distributed.cluster import Cluster
from facedist.models.backbones import registry
from facedist.preflight import checks, devices
from facedist.preflight.checks import Finding
from facedist.training import train_state
from facedist.training.checkpoint import manager, uploader
from facedist.training.config import TrainConfig, resolve
from tests import noise_sets, speck

SETTINGS = TrainConfig(strategy="multiworker")


@pytest.fixture(autouse=True)
def _small_backbone() -> Iterator[None]:
  with mock.patch.dict(registry.BACKBONES):
    speck.register()
    yield


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> manifest.Manifest:
  folder = tmp_path_factory.mktemp("shards")
  return noise_sets.write(folder, identities=10, images=1, size=112)


def batch_finding(
  strategy: tf.distribute.Strategy, content: manifest.Manifest, global_batch: int
) -> Finding:
  settings = dataclasses.replace(SETTINGS, global_batch=global_batch)
  (found,) = devices.check_training(strategy, settings, content=content, is_chief=True)
  return found


def test_a_batch_that_does_not_divide_is_told_with_one_that_does(
  two_replicas: tf.distribute.Strategy, content: manifest.Manifest
):
  found = batch_finding(two_replicas, content, 9)
  assert found.text == (
    "--global_batch=9 does not divide over 2 replicas (1 workers x 2)"
  )
  assert (found.fix, found.exit_code) == ("try --global_batch=8.", 2)


def test_a_batch_that_does_not_fit_is_told_with_what_would(
  two_replicas: tf.distribute.Strategy,
  content: manifest.Manifest,
  monkeypatch: pytest.MonkeyPatch,
):
  reason = "OOM when allocating tensor with shape[4,64,56,56]\nHint: more"
  full = tf.errors.ResourceExhaustedError(None, None, reason)
  monkeypatch.setattr(devices, "_train", mock.Mock(side_effect=full))
  found = batch_finding(two_replicas, content, 8)
  assert found.text == (
    "4 images of 112 px a replica do not fit its memory (OOM when allocating tensor "
    "with shape[4,64,56,56])"
  )
  assert found.fix.startswith("raise --accumulate_steps, lower --global_batch")
  assert found.exit_code == errors.ExitCode.USAGE


def test_the_newest_checkpoint_is_restored_into_the_network_that_was_tried(
  two_replicas: tf.distribute.Strategy,
  content: manifest.Manifest,
  tmp_path: pathlib.Path,
):
  small = dataclasses.replace(content, image_size=32)
  settings = resolve(
    TrainConfig(
      workdir=str(tmp_path),
      backbone="speck",
      backbone_weights="none",
      embedding_size=8,
      global_batch=4,
      head_sharding="sharded",
    )
  )

  def restore_finding(settings: TrainConfig) -> Finding:
    batch, restored = devices.check_training(
      two_replicas, settings, content=small, is_chief=True
    )
    assert (batch.check, batch.state) == ("batch", "ok")
    return restored

  saved = train_state.build_train_state(
    two_replicas, settings, image_size=32, num_identities=10
  )
  manager.CheckpointManager(
    saved.checkpoint(),
    two_replicas,
    uploader=uploader.DiskUploader(str(tmp_path), is_chief=True, keep_last=1),
    facts=manager.data_facts(small),
    rows=saved.rows,
  ).save(7)
  assert restore_finding(settings).text == "step-00000007 fits this network"
  # such as a build of this package that made its network otherwise
  found = restore_finding(dataclasses.replace(settings, ema_decay=0.5))
  assert f"{tmp_path}/checkpoints/step-00000007 does not fit this " in found.text
  assert found.exit_code == errors.ExitCode.DATA
  assert found.fix


def test_a_worker_that_is_lost_while_devices_are_tried_is_a_finding(
  monkeypatch: pytest.MonkeyPatch,
):
  lost = tf.errors.UnavailableError(None, None, "Socket closed\nmore")
  monkeypatch.setattr(doctor, "_try_devices", mock.Mock(side_effect=lost))
  (found,) = doctor._on_devices(doctor.DoctorConfig(), Cluster())
  assert found.text == "another worker was lost meanwhile (Socket closed)"
  assert found.exit_code == errors.ExitCode.PEER_LOST


@pytest.mark.parametrize(
  ("gpus", "communication", "text"),
  [
    (["GPU:0"], "auto", "NCCL, since there are GPUs"),
    ([], "auto", "RING, since there is no GPU here"),
    (["GPU:0"], "ring", "RING, since --communication says so"),
  ],
)
def test_what_gradients_travel_by_is_told_with_the_reason(
  two_replicas: tf.distribute.Strategy,
  monkeypatch: pytest.MonkeyPatch,
  gpus: list[str],
  communication: str,
  text: str,
):
  monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: gpus)
  settings = dataclasses.replace(SETTINGS, communication=communication)
  assert next(devices.check_collectives(two_replicas, settings)).text == text


def test_the_rate_of_an_all_reduce_is_that_of_each_link(
  two_replicas: tf.distribute.Strategy,
):
  *_, last = devices.check_collectives(two_replicas, SETTINGS)
  found = re.fullmatch(r"100 MB in (\S+) ms, (\S+) GB/s a link", last.text)
  assert found
  # over two replicas each link carries 2 · (2 - 1) / 2 of the size
  assert float(found[2]) == pytest.approx(100 / float(found[1]), rel=0.05, abs=0.01)


class Driver:
  """CUDA's, of two GPUs; it writes where ctypes says."""

  def cuInit(self, flags: int) -> int:  # noqa: N802
    return flags

  def cuDeviceGet(self, device: Any, place: ctypes.c_int) -> int:  # noqa: N802
    device._obj.value = 10 + place.value
    return 0 if place.value < 2 else 101

  def cuDeviceTotalMem_v2(self, total: Any, device: ctypes.c_int) -> int:  # noqa: N802
    total._obj.value = {10: 85_000_000_000, 11: 42_500_000_000}[device.value]
    return 0


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
  details = {"compute_capability": (8, 0), "device_name": "NVIDIA A100"}
  monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: ["0", "1", "2"])
  monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda _: details)


@pytest.mark.usefixtures("three_gpus")
def test_gpus_have_the_memory_that_the_driver_says(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
  assert devices.describe_devices() == [
    *("NVIDIA A100 (8.0, 85 GB)", "NVIDIA A100 (8.0, 42 GB)", "NVIDIA A100 (8.0)")
  ]
  monkeypatch.setattr(ctypes, "CDLL", mock.Mock(side_effect=OSError))
  assert devices.describe_devices() == ["NVIDIA A100 (8.0)"] * 3
  monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: [])
  assert devices.describe_devices() == ["CPU"]


@pytest.mark.usefixtures("three_gpus")
def test_machine_code_is_compared_once_for_each_kind_of_gpu():
  (found,) = devices.check_machine_code()
  assert found.state == checks.GOOD
  assert found.text.startswith("NVIDIA A100 has compute capability 8.0, for which Tens")


@pytest.mark.parametrize(
  ("capability", "fix_of_2_15", "fix_of_2_21"),
  [
    ((7, 5), "", ""),
    ((8, 0), "", ""),
    ((8, 9), "", ""),
    ((9, 0), "use TensorFlow 2.21, or keep", ""),
    ((10, 0), "use TensorFlow 2.21, or keep", "keep what is compiled with CUDA_CACHE"),
    ((12, 0), "use TensorFlow 2.21, or keep", "keep what is compiled with CUDA_CACHE"),
    ((5, 2), "", "use TensorFlow 2.15"),
  ],
)
def test_a_gpu_needs_machine_code_of_its_major_version_and_no_later_minor_one(
  capability: tuple[int, int], fix_of_2_15: str, fix_of_2_21: str
):
  for version, built, fix in (
    ("2.15.1", ("sm_50", "sm_60", "sm_70", "sm_75", "compute_80"), fix_of_2_15),
    ("2.21.0", ("sm_60", "sm_70", "sm_80", "sm_89", "compute_90"), fix_of_2_21),
  ):
    found = devices.compare_machine_code("GPU", capability, built, version=version)
    assert found.state == (checks.WARNING if fix else checks.GOOD)
    assert found.fix.startswith(fix)


@pytest.mark.gpu
def test_every_gpu_is_described_with_its_kind_and_memory():
  gpus = tf.config.list_physical_devices("GPU")
  if not gpus:
    pytest.skip("there is no GPU")
  found = devices.describe_devices()
  assert len(found) == len(gpus)
  assert all(re.fullmatch(r".+ \(\d+\.\d+, \d+ GB\)", name) for name in found)
