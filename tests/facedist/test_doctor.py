"""facedist.doctor as a user runs it."""

import json
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from facedist import doctor, errors
from tests import noise_sets, processes

FLAGS = (
  "--backbone=tinynet",
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


def examine(*flags: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-m", "facedist.doctor", *FLAGS, *flags],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_a_valid_setup_is_reported_and_nothing_is_left_behind(
  shards: pathlib.Path, tmp_path: pathlib.Path
):
  process = examine(f"--data_dir={shards}", f"--workdir={tmp_path}", "--json")
  output, log = process.communicate(timeout=200)
  assert process.returncode == 0, log
  content = json.loads(output)
  assert content["ready"] is True
  assert content["exit_code"] == 0
  texts = {finding["check"]: finding["text"] for finding in content["findings"]}
  assert "16 images of 4 identities, 32 px" in texts["data"]
  assert "all 2 shards have their size and CRC" in texts["data"]
  assert "8 images of 32 px a replica" in texts["batch"]
  assert texts["restore"] == "there is no checkpoint yet"
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("changes", "code", "text"),
  [
    ({"data_dir": "nowhere"}, 4, "bad     data: nowhere/manifest.json does not exist"),
    ({"workdir": "/proc/x"}, 2, "bad     workdir:"),
    ({"full_warmup_epochs": 99.0}, 2, "shorten it"),
    ({"backbone": "vgg99"}, 2, "choose one of"),
  ],
)
def test_a_problem_is_one_line_that_says_what_to_do(
  shards: pathlib.Path,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture,
  changes: dict[str, Any],
  code: int,
  text: str,
):
  folders = {"data_dir": str(shards), "workdir": str(tmp_path)}
  given = {"quick": True, "global_batch": 8} | folders | changes
  assert doctor.main(doctor.DoctorConfig(**given)) == code
  output = capsys.readouterr().out
  assert text in output
  bad = [line for line in output.splitlines() if line.startswith("bad")]
  assert bad
  assert all(" -> " in line for line in bad)


TWO = json.dumps(
  {
    "cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]},
    "task": {"type": "worker", "index": 0},
  }
)


def wrong(error: Exception) -> Callable[..., None]:
  """Returns what raises."""

  def fail(*_: object, **__: object) -> None:
    raise error

  return fail


@pytest.mark.parametrize(
  ("tf_config", "patch", "check", "code"),
  [
    ("{", None, "cluster", 2),
    (TWO, None, "flags", 2),  # --strategy=one
    (
      "",
      ("strategies.make_strategy", errors.UsageError("no GPU; get one.")),
      "strategy",
      2,
    ),
    ("", ("checks.check_run", RuntimeError("a bug\nmore")), "doctor", 1),
    (
      TWO,
      (
        "cluster_checks.FailureDetector",
        errors.UsageError("cannot listen; free the port."),
      ),
      "ports",
      2,
    ),
  ],
)
def test_json_is_printed_whatever_is_wrong(
  shards: pathlib.Path,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
  tf_config: str,
  patch: tuple[str, Exception] | None,
  check: str,
  code: int,
):
  monkeypatch.setenv("TF_CONFIG", tf_config)
  if patch is not None:
    monkeypatch.setattr(f"facedist.doctor.{patch[0]}", wrong(patch[1]))
  settings = doctor.DoctorConfig(
    data_dir=str(shards),
    workdir=str(tmp_path),
    backbone="tinynet",
    backbone_weights="none",
    global_batch=8,
    strategy="multiworker" if check == "ports" else "one",
    full_warmup_epochs=0.0,
    quick=check in ("cluster", "flags"),
    json=True,
  )
  assert doctor.main(settings) == code
  content = json.loads(capsys.readouterr().out)
  assert (content["ready"], content["exit_code"]) == (False, code)
  (bad,) = [one for one in content["findings"] if one["state"] == "bad"]
  assert (bad["check"], bad["exit_code"]) == (check, code)
  assert bad["mend"]


@pytest.mark.slow
def test_two_workers_check_each_other(shards: pathlib.Path, tmp_path: pathlib.Path):
  with socket.socket() as first, socket.socket() as second:
    first.bind(("127.0.0.1", 0))
    second.bind(("127.0.0.1", 0))
    workers = [f"127.0.0.1:{bound.getsockname()[1]}" for bound in (first, second)]
  doctors = []
  for index in range(2):
    task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
    doctors.append(
      processes.start(
        *("facedist.doctor", *FLAGS, "--strategy=multiworker"),
        *(f"--data_dir={shards}", f"--workdir={tmp_path / 'run'}"),
        log=tmp_path / f"log-{index}",
        environment={"TF_CONFIG": json.dumps(task)},
      )
    )
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
