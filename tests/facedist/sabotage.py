"""A worker with one thing wrong: `python sabotage.py FAULT STEP -- <train flags>`.

The fault affects one worker, from the given step on: worker 1, or the chief if only the
chief does such a thing, or another with `FAULT of worker N`. A full disk is full from
one save to the next; the workdir has to be a disk of its own. Everything else is
facedist.train unchanged.
"""

import contextlib
import ctypes
import os
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
has_fault = index == int(number or (0 if fault in OF_THE_CHIEF else 1))


def after(function, number: int, action):
  """Wraps a function; from its call `number` on, `action` comes first."""
  calls = [0]

  def wrapped(*arguments, **more):
    calls[0] += 1
    if calls[0] > number:
      action(*arguments)
    return function(*arguments, **more)

  return wrapped


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


if fault in DEVICES:
  (cpu,) = tf.config.list_physical_devices("CPU")
  parts = [tf.config.LogicalDeviceConfiguration()] * DEVICES[fault]
  tf.config.set_logical_device_configuration(cpu, parts)
elif fault == "not finite":
  augment.draws = nan_draws(augment.draws)
elif fault == "asked to stop, in forming" and not has_fault:
  train.preflight = after(train.preflight, 0, lambda *_: time.sleep(SLOW))
elif not has_fault:
  pass
elif name in SIGNALS:
  module, function = PLACES[place]
  original = getattr(module, function)

  def send_once(*arguments, **more):
    setattr(module, function, original)
    os.kill(os.getpid(), SIGNALS[name])
    return original(*arguments, **more)

  setattr(module, function, send_once)
elif fault == "stuck in Python":
  trainer.Trainer._end_interval = after(trainer.Trainer._end_interval, step, sleep)
elif fault == "stuck with the lock":
  trainer.Trainer._end_interval = after(
    trainer.Trainer._end_interval, step, sleep_with_the_lock
  )
elif fault == "stuck in a read":
  record_reader.RecordReader.read_batch = after(
    record_reader.RecordReader.read_batch, step, sleep
  )
elif fault == "stuck in a save":
  if index == 0:
    checkpoints.write_marker = after(checkpoints.write_marker, step, sleep)
  else:
    manager.CheckpointManager.save = after(manager.CheckpointManager.save, step, sleep)
elif fault == "other version":
  train.__version__ = "9.9.9"
elif fault == "flipped bit":
  trainer.Trainer._end_interval = after(trainer.Trainer._end_interval, step, nudge)
elif fault in ("full disk", "file size limit"):
  (workdir,) = (word[10:] for word in sys.argv if word.startswith("--workdir="))
  filler = os.path.join(workdir, "filler")

  def fill() -> None:
    if fault == "full disk":  # the workdir has one of its own
      with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
          pass
    else:
      limit = 20_000  # bytes; more than the logs, less than a checkpoint
      resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

  def empty() -> None:
    if fault == "full disk":
      os.remove(filler)
    else:
      resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

  original = manager.CheckpointManager.save
  calls = [0]

  def save(self, *arguments, **more):
    calls[0] += 1
    if fault == "full disk" and calls[0] == step + 1:
      empty()
    if calls[0] == step:
      fill()
    original(self, *arguments, **more)
    if fault != "full disk" and calls[0] == step:
      empty()

  manager.CheckpointManager.save = save

train.run()
