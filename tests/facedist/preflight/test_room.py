"""Whether checkpoints have room: by what one takes, or by what it will be made of."""

import dataclasses
import pathlib
import shutil
from typing import Any

import pytest

from facedist.data.shards import manifest
from facedist.preflight import checks
from facedist.preflight.checks import Finding
from facedist.training import train_state
from facedist.training.checkpoint import checkpoints, manager, uploader
from facedist.training.config import TrainConfig, resolve
from tests import noise_sets

IDENTITIES = 3


@pytest.fixture
def settings(tmp_path: pathlib.Path) -> TrainConfig:
  """A new run of a small network on a few faces."""
  noise_sets.write(tmp_path / "shards", identities=IDENTITIES, images=2, size=32)
  (tmp_path / "run").mkdir()
  return TrainConfig(
    data_dir=str(tmp_path / "shards"),
    workdir=str(tmp_path / "run"),
    backbone="tinynet",
    keep_last=3,
  )


def free(monkeypatch: pytest.MonkeyPatch, count: float) -> None:
  """Lets every disk have so many bytes left."""
  usage = shutil.disk_usage("/")
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(count)))


def write_marker(settings: TrainConfig, step: int) -> None:
  """Writes the marker of a checkpoint of 7 MB, 2 MB of them rows."""
  sizes = {"a": 4_000_000, "b": 1_000_000}
  content = {
    "files": {name: {"bytes": size, "crc32c": 0} for name, size in sizes.items()},
    "rows": {"files": {"c": {"bytes": 2_000_000, "crc32c": 0}}},
  }
  checkpoints.write_marker(checkpoints.at(str(settings.workdir), step).path, content)


def found_of(settings: TrainConfig, *, is_quick: bool = False) -> Finding:
  """Returns what is found of the room."""
  (found,) = checks.check_room(resolve(settings), is_quick=is_quick)
  return found


def test_a_run_that_goes_on_is_judged_by_the_checkpoint_that_it_has(
  settings: TrainConfig, monkeypatch: pytest.MonkeyPatch
):
  write_marker(settings, 10)
  free(monkeypatch, 21e6)
  found = found_of(settings)  # of four at the most it has one
  assert found.state == "ok"
  assert "3 more checkpoints of 7 MB want 21 MB" in found.text
  free(monkeypatch, 20e6)
  assert found_of(settings).state == "warning"  # a save may fail, the run goes on
  for step in (20, 30, 40):
    write_marker(settings, step)
  assert "1 more checkpoints of 7 MB" in found_of(settings).text


def test_a_new_run_without_room_is_refused_by_the_doctor_and_warned_at_its_start(
  settings: TrainConfig, monkeypatch: pytest.MonkeyPatch
):
  free(monkeypatch, 1e7)
  found = found_of(settings)
  assert (found.state, found.exit_code) == ("bad", 2)
  assert found.fix == "make room, lower --keep_last, or choose another --workdir"
  assert found_of(settings, is_quick=True).state == "warning"
  free(monkeypatch, 1e12)
  assert found_of(settings).state == "ok"


def test_many_identities_want_the_room_of_their_centres_and_slots(
  settings: TrainConfig, monkeypatch: pytest.MonkeyPatch
):
  made = manifest.load(str(settings.data_dir))
  names = tuple(f"n{number:06d}" for number in range(100_000))
  manifest.save(dataclasses.replace(made, identities=names), str(settings.data_dir))
  free(monkeypatch, 1e7)
  # tinynet's 0.94 million weights, centres of 512 floats, and a momentum of each
  assert "of 417 MB want 1.7 GB" in found_of(settings).text


@pytest.mark.parametrize(
  "changes",
  [
    {"head_sharding": "sharded"},
    {"head_sharding": "sharded", "optimizer": "adamw"},
    {"optimizer": "adamw", "ema_decay": 0.9},
  ],
)
def test_a_checkpoint_takes_what_was_expected(
  settings: TrainConfig, two_replicas, changes: dict[str, Any]
):
  full = dataclasses.replace(settings, backbone_weights="none", **changes)
  built = train_state.build_train_state(
    two_replicas, resolve(full), image_size=32, num_identities=IDENTITIES
  )
  manager.CheckpointManager(
    built.checkpoint(),
    two_replicas,
    uploader=uploader.DiskUploader(str(full.workdir), is_chief=True, keep_last=3),
    facts={},
    rows=built.rows,
  ).save(1)
  (saved,) = checkpoints.list_checkpoints(str(full.workdir))
  assert checks.saved_bytes(saved) == pytest.approx(
    checks.expected_bytes(resolve(full)), rel=0.02
  )


def test_where_the_size_or_the_disk_is_not_known_nothing_is_said(
  settings: TrainConfig,
):
  for changes in ({"workdir": None}, {"workdir": "gs://b/run"}, {"data_dir": "none"}):
    changed = dataclasses.replace(settings, **changes)
    assert not list(checks.check_room(resolve(changed), is_quick=True))
