"""Signals that ask for a stop, sent to a real process."""

import pathlib
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, os, sys, time
from facedist.distributed.preemption import Preemption
preemption = Preemption(
  grace_seconds=float(sys.argv[1]), end=lambda code, reason: os._exit(code)
)
with preemption.listen():
  asked = []
  if sys.argv[2] == "armed":
    preemption.arm(lambda: asked.append(1))
  print("ready", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 6_000_000)  # seconds of native code
  print(f"asked {len(asked)} {preemption.is_requested}", flush=True)
  time.sleep(0 if len(sys.argv) < 4 else 60)
"""


def start(*arguments: str) -> subprocess.Popen:
  process = subprocess.Popen(
    [sys.executable, "-c", PROGRAM, *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[3],
  )
  assert process.stdout is not None
  assert process.stdout.readline() == "ready\n"
  return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_received_while_native_code_runs(number: signal.Signals):
  process = start("60", "armed")
  process.send_signal(number)
  output, _ = process.communicate(timeout=30)
  assert output == "asked 1 True\n"
  assert process.returncode == 0


def test_the_second_signal_ends_at_once():
  process = start("60", "armed", "stay")
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGUSR1)
  _, log = process.communicate(timeout=30)
  assert process.returncode == 143
  assert "again: ending at once; the newest checkpoint stays valid." in log


def test_with_nothing_to_save_the_first_one_ends():
  process = start("60", "unarmed", "stay")
  process.send_signal(signal.SIGTERM)
  _, log = process.communicate(timeout=30)
  assert process.returncode == 143
  assert "SIGTERM: there is nothing to save yet; ending." in log


def test_the_grace_period_is_an_end_too():
  process = start("0.2", "armed", "stay")
  process.send_signal(signal.SIGTERM)
  _, log = process.communicate(timeout=30)
  assert process.returncode == 143
  assert "not saved within --grace_seconds=0.2" in log
