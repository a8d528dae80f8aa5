"""What is found of devices, and of a batch on them."""

import ctypes
import dataclasses
import pathlib
import re

import pytest
import tensorflow as tf

from facedist import doctor, errors
from facedist.data.shards import manifest
from facedist.distributed.cluster import Cluster
from facedist.preflight import checks, devices
from facedist.preflight.checks import Finding
from facedist.training import train_state
from facedist.training.checkpoint import manager, uploader
from facedist.training.config import TrainConfig, resolve

SETTINGS = dataclasses.replace(TrainConfig(), global_batch=9)
CONTENT = manifest.Manifest(
  kind="classification",
  dataset="none",
  tool_version="0",
  image_size=112,
  quality=95,
  alignment={},
  source={},
  identities=tuple("0123456789"),
  identity_names={},
  splits={},
)


def batch_finding(strategy: tf.distribute.Strategy, **changes: object) -> Finding:
  settings = dataclasses.replace(SETTINGS, **changes)
  (found,) = devices.check_training(strategy, settings, content=CONTENT, is_chief=True)
  return found


def test_a_batch_that_does_not_divide_is_told_with_one_that_does(
  two_replicas: tf.distribute.Strategy,
):
  found = batch_finding(two_replicas)
  assert found.text == (
    "--global_batch=9 does not divide over 2 replicas (1 workers x 2)"
  )
  assert (found.fix, found.exit_code) == ("try --global_batch=8.", 2)


def test_a_batch_that_does_not_fit_is_told_with_what_would(
  two_replicas: tf.distribute.Strategy, monkeypatch: pytest.MonkeyPatch
):
  def exhaust(*_: object) -> None:
    reason = "OOM when allocating tensor with shape[4,64,56,56]\nHint: more"
    raise tf.errors.ResourceExhaustedError(None, None, reason)

  monkeypatch.setattr(devices, "_train", exhaust)
  found = batch_finding(two_replicas, global_batch=8)
  assert found.text == (
    "4 images of 112 px a replica do not fit its memory (OOM when allocating tensor "
    "with shape[4,64,56,56])"
  )
  assert found.fix.startswith("raise --accumulate_steps, lower --global_batch")
  assert found.exit_code == errors.ExitCode.USAGE


@pytest.mark.parametrize("head_sharding", ["replicated", "sharded"])
def test_the_newest_checkpoint_is_restored_into_the_network_that_was_tried(
  two_replicas: tf.distribute.Strategy,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  head_sharding: str,
):
  settings = TrainConfig(
    workdir=str(tmp_path),
    backbone="tinynet",
    backbone_weights="none",
    embedding_size=8,
    global_batch=4,
    head_sharding=head_sharding,
  )
  content = dataclasses.replace(CONTENT, image_size=32)

  def build(strategy: tf.distribute.Strategy, settings: TrainConfig, *_: object):
    return train_state.build_train_state(
      strategy, resolve(settings), image_size=32, num_identities=10
    )

  monkeypatch.setattr(devices, "_train", build)  # which takes a minute to end

  def restore_finding(settings: TrainConfig) -> Finding:
    batch, restored = devices.check_training(
      two_replicas, settings, content=content, is_chief=True
    )
    assert (batch.check, batch.state) == ("batch", "ok")
    return restored

  assert restore_finding(settings).text == "there is no checkpoint yet"
  saved = build(two_replicas, settings)
  manager.CheckpointManager(
    saved.checkpoint(),
    two_replicas,
    uploader=uploader.DiskUploader(str(tmp_path), is_chief=True, keep_last=1),
    facts=manager.data_facts(content),
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
  def lose(*_: object) -> None:
    raise tf.errors.UnavailableError(None, None, "Socket closed\nmore")

  monkeypatch.setattr(doctor, "_try_devices", lose)
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
def test_what_gradients_travel_by_is_told_with_the_reason_and_the_rate(
  two_replicas: tf.distribute.Strategy,
  monkeypatch: pytest.MonkeyPatch,
  gpus: list[str],
  communication: str,
  text: str,
):
  monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: gpus)
  monkeypatch.setattr(devices, "_time_all_reduce", lambda *_: 0.1)  # seconds
  settings = dataclasses.replace(
    SETTINGS, strategy="multiworker", communication=communication
  )
  chosen, *timed = devices.check_collectives(two_replicas, settings)
  assert chosen.text == text
  # over two replicas each link carries 2 · (2 - 1) / 2 of the size
  assert timed[-1].text == "100 MB in 100.0 ms, 1.00 GB/s a link"


class Driver:
  """CUDA's, of two GPUs; it writes where ctypes says."""

  def cuInit(self, flags: int) -> int:  # noqa: N802
    return flags

  def cuDeviceGet(self, device: object, place: ctypes.c_int) -> int:  # noqa: N802
    device._obj.value = 10 + place.value  # type: ignore[attr-defined]
    return 0 if place.value < 2 else 101

  def cuDeviceTotalMem_v2(self, total: object, device: ctypes.c_int) -> int:  # noqa: N802
    total._obj.value = {10: 85_000_000_000, 11: 42_500_000_000}[device.value]  # type: ignore[attr-defined]
    return 0


def test_a_gpu_s_memory_is_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
  memories = [devices._memory_bytes(place) for place in range(3)]
  assert memories == [85_000_000_000, 42_500_000_000, None]


def test_without_a_driver_a_worker_has_a_cpu(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(devices, "_DRIVER", "libnowhere.so")
  monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: [])
  assert devices._memory_bytes(0) is None
  assert devices.describe_devices() == ["CPU"]


TENSORFLOW_2_15 = ("sm_50", "sm_60", "sm_70", "sm_75", "compute_80")
TENSORFLOW_2_21 = ("sm_60", "sm_70", "sm_80", "sm_89", "compute_90")


@pytest.mark.parametrize(
  ("capability", "old", "new"),
  [
    ((7, 5), True, True),
    ((8, 0), True, True),
    ((8, 9), True, True),
    ((9, 0), False, True),
    ((10, 0), False, False),
    ((12, 0), False, False),
    ((5, 2), True, False),
  ],
)
def test_a_gpu_needs_machine_code_of_its_major_version_and_no_later_minor_one(
  capability: tuple[int, int], old: bool, new: bool
):
  for built, version, expected in (
    (TENSORFLOW_2_15, "2.15.1", old),
    (TENSORFLOW_2_21, "2.21.0", new),
  ):
    found = devices.compare_machine_code("GPU", capability, built, version=version)
    assert (found.state == checks.GOOD) == expected


def test_a_gpu_without_machine_code_is_told_with_the_cost_and_the_lane():
  found = devices.compare_machine_code(
    "NVIDIA H100", (9, 0), TENSORFLOW_2_15, version="2.15.1"
  )
  assert str(found) == (
    "warning gpu code: NVIDIA H100 has compute capability 9.0, and TensorFlow 2.15.1 "
    "holds machine code for 5.0, 6.0, 7.0, 7.5, 8.0: the driver compiles each kernel "
    "at its first use, about a minute at the first step, or the GPU does not run at "
    "all -> use TensorFlow 2.21, or keep what is compiled with CUDA_CACHE_PATH "
    "(docs/launch.md)"
  )
  old = devices.compare_machine_code("M40", (5, 2), TENSORFLOW_2_21, version="2.21.0")
  assert (old.text[-23:], old.fix) == ("so the GPU does not run", "use TensorFlow 2.15")


def test_machine_code_is_compared_once_for_each_kind_of_gpu(
  monkeypatch: pytest.MonkeyPatch,
):
  details = {"compute_capability": (8, 0), "device_name": "NVIDIA A100"}
  monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: ["0", "1"])
  monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda _: details)
  (found,) = devices.check_machine_code()
  assert found.state == checks.GOOD
  assert found.text.startswith(
    "NVIDIA A100 has compute capability 8.0, for which Tensor"
  )


@pytest.mark.gpu
def test_every_gpu_is_described_with_its_kind_and_memory():
  gpus = tf.config.list_physical_devices("GPU")
  if not gpus:
    pytest.skip("there is no GPU")
  found = devices.describe_devices()
  assert len(found) == len(gpus)
  assert all(re.fullmatch(r".+ \(\d+\.\d+, \d+ GB\)", name) for name in found)
