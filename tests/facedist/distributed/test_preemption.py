"""Signals that ask for a stop, sent to a real process."""

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


def send(signals: tuple[signal.Signals, ...], *arguments: str) -> tuple[int, str, str]:
  """Sends signals to the program; returns its exit code, output and log."""
  process = subprocess.Popen(
    [sys.executable, "-c", PROGRAM, *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == "ready\n"
  for number in signals:
    process.send_signal(number)
  output, log = process.communicate(timeout=30)
  return process.returncode, output, log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_received_while_native_code_runs(number: signal.Signals):
  code, output, _ = send((number,), "60", "armed")
  assert (code, output) == (0, "asked 1 True\n")


@pytest.mark.parametrize(
  ("signals", "grace", "state", "says"),
  [
    (
      (signal.SIGTERM, signal.SIGUSR1),
      *("60", "armed"),
      "again: ending at once; the newest checkpoint stays valid.",
    ),
    (
      (signal.SIGTERM,),
      *("60", "unarmed"),
      "SIGTERM: there is nothing to save yet; ending.",
    ),
    ((signal.SIGTERM,), "0.2", "armed", "not saved within --grace_seconds=0.2"),
  ],
  ids=["asked twice", "nothing to save", "the grace period is over"],
)
def test_a_process_ends_at_once_and_says_why(
  signals: tuple[signal.Signals, ...], grace: str, state: str, says: str
):
  code, _, log = send(signals, grace, state, "stay")
  assert code == 143
  assert says in log
