"""Claims on checkpoints, on a disk and in a bucket, between evaluators that may die."""

import pathlib
import subprocess
import sys
import threading

import pytest

from facedist import storage
from facedist.evaluation.claims import CLAIMS_FOLDER, Claims


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path: pathlib.Path, bucket: str) -> str:
  return str(tmp_path) if request.param == "disk" else f"{bucket}/run"


def _files(workdir: str) -> list[str]:
  return storage.list_names(storage.join(workdir, CLAIMS_FOLDER))


def test_a_claim_is_of_one_evaluator_until_it_is_released(workdir: str):
  first, second = Claims(workdir, "plan"), Claims(workdir, "plan")
  assert first.take(100)
  assert not first.take(100)
  assert not second.take(100)
  assert (first.others(), second.others()) == (set(), {100})
  assert second.take(200)
  assert Claims(workdir, "other").take(100)
  first.renew()
  assert not second.take(100)
  first.release(100)
  assert second.take(100)
  second.release_all()
  assert [name[:5] for name in _files(workdir)] == ["other"]


def test_only_one_of_many_at_once_gets_a_claim(workdir: str):
  evaluators = [Claims(workdir, "plan") for _ in range(8)]
  taken = []

  def take(claims: Claims) -> None:
    taken.append([claims.take(step) for step in range(3)])

  threads = [threading.Thread(target=take, args=(each,)) for each in evaluators]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [sum(column) for column in zip(*taken, strict=True)] == [1, 1, 1]


def test_a_claim_that_is_not_renewed_is_free_after_a_while(workdir: str):
  seconds = [0.0]
  lost = Claims(workdir, "plan")
  heir = Claims(workdir, "plan", silent_seconds=60.0, clock=lambda: seconds[0])
  assert lost.take(100)
  assert not heir.take(100)
  seconds[0] = 59.0
  lost.renew()
  assert not heir.take(100)
  seconds[0] = 118.0  # 59 s after the renewal was seen
  assert not heir.take(100)
  seconds[0] = 120.0
  assert heir.take(100)
  lost.renew()  # the halted process runs again, and finds that its claim is gone
  lost.release(100)
  assert not lost.take(100)
  assert len(_files(workdir)) == 1


def test_a_claim_of_a_killed_process_of_this_machine_is_free_at_once(workdir, tmp_path):
  program = """
import os, signal, sys
from facedist.evaluation.claims import Claims
Claims(sys.argv[1], "plan").take(100)
os.kill(os.getpid(), signal.SIGKILL)
"""
  run = str(tmp_path)
  subprocess.run([sys.executable, "-c", program, run], check=False)
  assert len(_files(run)) == 1
  claims = Claims(run, "plan")
  assert claims.others() == set()
  assert claims.take(100)
