import pytest
import tensorflow as tf

from facedist.training import loss_scale


def advance(scale: float, good_steps: int, is_finite: bool) -> tuple[float, int]:
  scale, steps = loss_scale.next_scale(
    tf.constant(scale), tf.constant(good_steps, tf.int64), tf.constant(is_finite)
  )
  return float(scale), int(steps)


@pytest.mark.parametrize(
  ("before", "is_finite", "after"),
  [
    ((1024.0, 5), True, (1024.0, 6)),
    ((1024.0, 1999), True, (2048.0, 0)),
    ((1024.0, 1999), False, (512.0, 0)),
    ((1.0, 7), False, (1.0, 0)),
  ],
)
def test_the_scale_doubles_after_2000_good_steps_and_halves_on_overflow(
  before: tuple[float, int], is_finite: bool, after: tuple[float, int]
):
  assert advance(*before, is_finite) == after


def test_a_skipped_step_is_counted():
  scale = loss_scale.LossScale(is_dynamic=True)
  assert scale.scale.numpy() == 32768.0
  for is_finite in (False, True, False):
    scale.update(tf.constant(is_finite))
  assert (scale.scale.numpy(), scale.skipped.numpy()) == (8192.0, 2)
