"""facedist.doctor as a user runs it."""

import dataclasses
import json
import pathlib
import socket
from typing import Any

import pytest

from facedist import doctor, errors
from facedist.distributed import detect, heartbeat, strategies
from tests import noise_sets, processes

FLAGS = (
  "--backbone=speck",
  "--backbone_weights=none",
  "--embedding_size=16",
  "--global_batch=8",
  "--head_epochs=0",
  "--full_warmup_epochs=0",
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("shards")
  noise_sets.write(folder, identities=4, images=4, size=32, shards=2)
  return folder


@pytest.mark.slow
def test_a_valid_setup_is_reported_and_nothing_is_left_behind(
  shards: pathlib.Path, tmp_path: pathlib.Path
):
  folders = (f"--data_dir={shards}", f"--workdir={tmp_path}")
  done = processes.run("facedist.doctor", *FLAGS, *folders, "--json", timeout=200)
  assert done.returncode == 0, done.stderr
  content = json.loads("{" + done.stderr.split("\n{", 1)[1])
  assert content["ready"] is True
  assert content["exit_code"] == 0
  texts = {finding["check"]: finding["text"] for finding in content["findings"]}
  assert "16 images of 4 identities, 32 px" in texts["data"]
  assert "all 2 shards have their size and CRC" in texts["data"]
  assert "8 images of 32 px a replica" in texts["batch"]
  assert texts["restore"] == "there is no checkpoint yet"
  assert list(tmp_path.iterdir()) == []


def tf_config(*workers: str, index: int = 0) -> str:
  task = {"type": "worker", "index": index}
  return json.dumps({"cluster": {"worker": workers}, "task": task})


TWO = tf_config("127.0.0.1:TAKEN", "127.0.0.1:1")


@pytest.mark.parametrize(
  ("variable", "changes", "check", "code"),
  [
    ("{", {"quick": True}, "cluster", 2),
    (TWO, {"quick": True}, "flags", 2),  # --strategy=one
    (TWO, {"strategy": "multiworker"}, "ports", 142),
    ("", {"global_batch": "a bug"}, "doctor", 1),
    ("", {}, "strategy", 2),
  ],
)
def test_json_is_printed_whatever_is_wrong(
  shards: pathlib.Path,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
  variable: str,
  changes: dict[str, Any],
  check: str,
  code: int,
):
  settings = doctor.DoctorConfig(
    data_dir=str(shards),
    workdir=str(tmp_path),
    backbone="tinynet",
    backbone_weights="none",
    global_batch=8,
    full_warmup_epochs=0.0,
    json=True,
  )

  def no_gpu(*_: object, **__: object) -> None:
    raise errors.UsageError("no GPU; get one.")

  if check == "strategy":
    monkeypatch.setattr(strategies, "make_strategy", no_gpu)
  monkeypatch.setattr(heartbeat, "_PORT_SECONDS", 0.0)  # that it waits for a port
  with socket.create_server(("", 0)) as server:
    port = str(server.getsockname()[1])
    monkeypatch.setenv("TF_CONFIG", variable.replace("TAKEN", port))
    assert doctor.main(dataclasses.replace(settings, **changes)) == code
  content = json.loads(capsys.readouterr().out)
  assert (content["ready"], content["exit_code"]) == (False, code)
  (bad,) = [one for one in content["findings"] if one["state"] == "bad"]
  assert (bad["check"], bad["exit_code"]) == (check, code)
  assert bad["mend"]


@pytest.mark.slow
def test_two_workers_check_each_other(shards: pathlib.Path, tmp_path: pathlib.Path):
  workers = detect.free_addresses(2)
  doctors = [
    processes.start(
      *("facedist.doctor", *FLAGS, "--strategy=multiworker"),
      *(f"--data_dir={shards}", f"--workdir={tmp_path / 'run'}"),
      log=tmp_path / f"log-{index}",
      environment={"TF_CONFIG": tf_config(*workers, index=index)},
    )
    for index in range(2)
  ]
  for index, process in enumerate(doctors):
    code = process.wait(250)
    output = (tmp_path / f"log-{index}").read_text()
    assert code == 0, output
    assert "ok      ports: TCP connects to all 1 peers" in output
    assert "ok      heartbeats: UDP passes both ways" in output
    assert "ok      peers: the same on all workers: config, data, facedist, " in output
    assert "ok      collectives: RING, since there is no GPU here" in output
    assert "100 MB in" in output
    assert "4 images of 32 px a replica" in output
