"""A worker with one thing wrong: `python sabotage.py FAULT STEP -- <train flags>`.

The fault affects one worker, from the given step on: worker 1, or the chief if only the
chief does such a thing, or another with `FAULT of worker N`. A disk is full from one
save to the next; the workdir has to be a disk of its own. Everything else is
facedist.train unchanged.
"""

import contextlib
import ctypes
import itertools
import os
import pathlib
import resource
import signal
import sys
import time

import numpy as np
import tensorflow as tf

from facedist import train
from facedist.data import augment
from facedist.data.readers import record_reader
from facedist.distributed import detect, strategies
from facedist.training import inputs, step_health, trainer
from facedist.training.checkpoint import checkpoints, manager

FOREVER = 3600
SLOW = 7  # seconds; longer than the runs' --peer_timeout
# No faults: one machine with so many devices.
DEVICES = {"two devices": 2, "four devices": 4}
OF_THE_CHIEF = ("stuck in a save", "full disk", "file size limit")
SIGNALS = {
  "asked to stop": signal.SIGTERM,
  "killed": signal.SIGKILL,
  "stopped": signal.SIGSTOP,
}
PLACES = {
  "at the start": (train, "preflight"),
  "with the data": (inputs, "open_dataset"),
  "in forming": (strategies, "restore_signals"),  # TensorFlow has the signals here
  "in compiling": (step_health, "local_flags"),
  "in validating": (trainer.Trainer, "_validate"),
}

fault, step = sys.argv[1], int(sys.argv[2])
fault, _, number = fault.partition(" of worker ")
name, _, place = fault.partition(", ")
del sys.argv[1:4]
index = detect.from_environment().index
(workdir,) = (word[10:] for word in sys.argv if word.startswith("--workdir="))
FILLER = os.path.join(workdir, "filler")
has_fault = index == int(number or (0 if fault in OF_THE_CHIEF else 1))


def before(owner, name: str, action, calls) -> None:
  """Has `action` come before those calls of a function, counted from 0."""
  original, count = getattr(owner, name), itertools.count()

  def wrapped(*arguments, **more):
    if next(count) in calls:
      action(*arguments)
    return original(*arguments, **more)

  setattr(owner, name, wrapped)


def sleep(*_) -> None:
  time.sleep(FOREVER)


def sleep_with_the_lock(*_) -> None:
  """Sleeps in native code that does not give the interpreter's lock back."""
  ctypes.PyDLL(None).sleep(FOREVER)


def nan_draws(original):
  """Makes the draws of one batch, known by its records, not a number."""

  def draws(seed, records, epochs):
    values = original(seed, records, epochs)
    bad = np.isin(records, np.array(os.environ["BAD_RECORDS"].split(","), int))
    is_colour = np.arange(values.shape[1]) >= 4  # TensorFlow 2.21 refuses such crops
    return np.where(
      (bad & (epochs == 0))[:, None] & is_colour, np.float32("nan"), values
    )

  return draws


def nudge(self, *_) -> None:
  """Changes one weight of this worker by one bit."""
  variable = self._state.head.centres
  local = variable.values[0] if hasattr(variable, "values") else variable
  value = local.numpy()
  value.view(np.int32)[0, 0] ^= 1
  local.assign(value)


def fill_disk(*_) -> None:
  with contextlib.suppress(OSError), open(FILLER, "wb", buffering=0) as stream:
    while stream.write(bytes(4096)):
      pass


def limit_files(*_) -> None:
  limit = 20_000  # bytes; more than the logs, less than a checkpoint
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def make_room(*_) -> None:
  pathlib.Path(FILLER).unlink(missing_ok=True)
  resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def leave_no_room(number: int, action) -> None:
  """Has an action that takes all room come before a save, counted from 1."""
  before(manager.CheckpointManager, "save", action, [number - 1])
  before(manager.CheckpointManager, "save", make_room, [number])


AT_A_STEP = {  # what comes before which function, from that call on
  "flipped bit": (trainer.Trainer, "_end_interval", nudge),
  "stuck in Python": (trainer.Trainer, "_end_interval", sleep),
  "stuck with the lock": (trainer.Trainer, "_end_interval", sleep_with_the_lock),
  "stuck in a read": (record_reader.RecordReader, "read_batch", sleep),
  "stuck in a save": (checkpoints, "write_marker", sleep),
}
NO_ROOM = {"full disk": fill_disk, "file size limit": limit_files}

if fault in DEVICES:
  (cpu,) = tf.config.list_physical_devices("CPU")
  parts = [tf.config.LogicalDeviceConfiguration()] * DEVICES[fault]
  tf.config.set_logical_device_configuration(cpu, parts)
elif fault == "not finite":
  augment.draws = nan_draws(augment.draws)
elif fault == "asked to stop, in forming" and not has_fault:
  before(train, "preflight", lambda *_: time.sleep(SLOW), [0])
elif not has_fault:
  pass
elif name in SIGNALS:
  before(*PLACES[place], lambda *_: os.kill(os.getpid(), SIGNALS[name]), [0])
elif fault in AT_A_STEP:
  before(*AT_A_STEP[fault], range(step, FOREVER))
elif fault in NO_ROOM:
  leave_no_room(step, NO_ROOM[fault])
elif fault == "other version":
  train.__version__ = "9.9.9"

train.run()
