import dataclasses
import math

import numpy as np
import tensorflow as tf

from facedist.training import config as train_config
from facedist.training import schedules
from facedist.training.config import resolve

BASE = train_config.TrainConfig(
  global_batch=10,
  head_epochs=1.0,
  head_rate=0.2,
  head_schedule="polynomial",
  full_epochs=3.0,
  full_rate=0.4,
  full_warmup_epochs=1.0,
  full_schedule="cosine",
  backbone_rate_factor=0.5,
)


def factors(phase: schedules.Phase) -> np.ndarray:
  steps = range(phase.first_step, phase.end_step)
  return np.array(
    [schedules.learning_rate_factor(phase, tf.constant(s, tf.int64)) for s in steps]
  )


def test_phases_follow_each_other_and_round_epochs_up_to_whole_steps():
  head, full = schedules.plan_phases(resolve(BASE), num_records=95)
  assert (head.first_step, head.end_step) == (0, 10)
  assert (full.first_step, full.end_step) == (10, 39)
  assert (head.learning_rate, head.backbone_learning_rate) == (0.2, 0.0)
  assert (full.learning_rate, full.backbone_learning_rate) == (0.4, 0.2)
  assert (head.trains_backbone, full.trains_backbone) == (False, True)


def test_a_phase_of_no_epochs_is_left_out():
  (full,) = schedules.plan_phases(
    resolve(dataclasses.replace(BASE, head_epochs=0.0)), num_records=95
  )
  assert (full.name, full.first_step) == ("full", 0)


def test_cosine_rises_linearly_then_falls_along_half_a_cosine():
  _, full = schedules.plan_phases(resolve(BASE), num_records=40)
  rising = [0.25, 0.5, 0.75, 1.0]
  falling = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
  np.testing.assert_allclose(factors(full), rising + falling, atol=1e-6)


def test_polynomial_falls_as_a_power_of_what_is_left():
  settings = dataclasses.replace(BASE, polynomial_power=3.0, final_rate_fraction=0.1)
  head, _ = schedules.plan_phases(resolve(settings), num_records=40)
  expected = [0.1 + 0.9 * (1 - i / 4) ** 3 for i in range(4)]
  np.testing.assert_allclose(factors(head), expected, atol=1e-6)


def test_step_multiplies_at_each_boundary():
  settings = dataclasses.replace(
    BASE, head_schedule="step", step_boundaries="0.5,0.75", step_factor=0.1
  )
  head, _ = schedules.plan_phases(resolve(settings), num_records=80)
  np.testing.assert_allclose(
    factors(head), [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-5
  )
