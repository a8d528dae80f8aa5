"""A worker with one thing wrong: `python sabotage.py FAULT STEP -- <train flags>`.

The fault strikes worker 1 alone, or the chief where that is said, once it has come to
the step. A full disk is full from one save to the next; the workdir has to be a disk of
its own. All else is facedist.train as it is.
"""

import contextlib
import os
import resource
import sys
import time

import numpy as np
import tensorflow as tf

from facedist import cluster, train
from facedist.data import augment, reader
from facedist.preflight import run_checks
from facedist.training import checkpoints, saving, trainer

fault, step = sys.argv[1], int(sys.argv[2])
del sys.argv[1:4]
index = cluster.from_environment().index
FOREVER = 3600
FULL = {"full disk": 0, "file size limit": 0, "file size limit of worker 1": 1}


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


def nan_draws(original):
  """Makes the draws of one batch, known by its records, not a number."""

  def draws(seed, records, epochs):
    values = original(seed, records, epochs)
    bad = np.isin(records, np.array(os.environ["BAD_RECORDS"].split(","), int))
    return np.where((bad & (epochs == 0))[:, None], np.float32("nan"), values)

  return draws


def nudge(self, *_) -> None:
  """Changes one weight of this worker by one bit."""
  variable = self._state.head.centres
  local = variable.values[0] if hasattr(variable, "values") else variable
  value = local.numpy()
  value.view(np.int32)[0, 0] ^= 1
  local.assign(value)


if fault == "four devices":  # no fault: one machine with as many
  (cpu,) = tf.config.list_physical_devices("CPU")
  quarters = [tf.config.LogicalDeviceConfiguration()] * 4
  tf.config.set_logical_device_configuration(cpu, quarters)
elif fault == "stuck in Python" and index == 1:
  trainer.Trainer._after = after(trainer.Trainer._after, step, sleep)
elif fault == "stuck in a read" and index == 1:
  reader.ShardReader.read_batch = after(reader.ShardReader.read_batch, step, sleep)
elif fault == "stuck in a save" and index == 0:
  checkpoints._write_marker = after(checkpoints._write_marker, step, sleep)
elif fault == "other version" and index == 1:
  train.__version__ = "9.9.9"
elif fault == "not finite":
  augment.draws = nan_draws(augment.draws)
elif fault == "flipped bit" and index == 1:
  trainer.Trainer._after = after(trainer.Trainer._after, step, nudge)
elif fault in FULL and index == FULL[fault]:
  (workdir,) = (word[10:] for word in sys.argv if word.startswith("--workdir="))
  filler = os.path.join(workdir, "filler")
  run_checks._CHECKPOINT_BYTES = 0  # a small disk will do

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

  original = saving.Saver.save
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

  saving.Saver.save = save

train.run()
