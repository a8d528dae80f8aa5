"""Every optimizer: its update by hand, its groups, and a run that is resumed."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from facedist.training import config as train_config
from facedist.training import loss_scale, optimizers, schedules, train_state
from facedist.training.checkpoint import checkpoints
from facedist.training.config import resolve
from tests.facedist.training import steps
from tests.facedist.training.steps import build, one

RUN = dataclasses.replace(
  steps.SPECK, embedding_batch_norm=True, backbone_rate_factor=0.25
)
RATE = 0.1
DECAY = 0.2
FIRST = {"dense/kernel": [[3.0, -4.0]], "dense/bias": [1.0, 0.5], "centres": [[0.0]]}
GRADIENTS = (
  {"dense/kernel": [[0.5, -1.0]], "dense/bias": [0.25, -3.0], "centres": [[0.125]]},
  {"dense/kernel": [[-2.0, 0.5]], "dense/bias": [1.0, 0.125], "centres": [[-4.0]]},
  {"dense/kernel": [[0.25, 4.0]], "dense/bias": [-0.5, 2.0], "centres": [[1.0]]},
)
Rows = np.ndarray
Slots = dict[str, Rows]
Update = Callable[[Rows, Slots, Rows, int, bool], None]


def sgd(weight: Rows, slots: Slots, gradient: Rows, step: int, decays: bool) -> None:
  """v ← 0.5 v + η (g + λ w), w ← w - v."""
  slots["v"] = 0.5 * slots["v"] + RATE * (gradient + DECAY * decays * weight)
  weight -= slots["v"]


def nesterov(
  weight: Rows, slots: Slots, gradient: Rows, step: int, decays: bool
) -> None:
  """As SGD, but w ← w - (0.5 v + η g): the next step of the same momentum."""
  pull = RATE * (gradient + DECAY * decays * weight)
  slots["v"] = 0.5 * slots["v"] + pull
  weight -= 0.5 * slots["v"] + pull


def moments(slots: Slots, gradient: Rows, step: int, epsilon: float) -> Rows:
  """Adam's direction, of the corrected first and second moment, step from 1."""
  slots["m"] = 0.8 * slots["m"] + 0.2 * gradient
  slots["v"] = 0.9 * slots["v"] + 0.1 * gradient**2
  mean, square = slots["m"] / (1 - 0.8**step), slots["v"] / (1 - 0.9**step)
  return mean / (np.sqrt(square) + epsilon)


def adamw(weight: Rows, slots: Slots, gradient: Rows, step: int, decays: bool) -> None:
  """arXiv:1711.05101, algorithm 2, whose α is in both terms here."""
  direction = moments(slots, gradient, step, 1e-8)
  weight -= RATE * (direction + DECAY * decays * weight)


def lamb(weight: Rows, slots: Slots, gradient: Rows, step: int, decays: bool) -> None:
  """arXiv:1904.00962, algorithm 2 with φ(z) = z; what does not decay has no ratio."""
  direction = moments(slots, gradient, step, 1e-6) + DECAY * decays * weight
  lengths = np.linalg.norm(weight), np.linalg.norm(direction)
  ratio = lengths[0] / lengths[1] if decays and all(lengths) else 1.0
  weight -= RATE * ratio * direction


UPDATES: dict[str, tuple[Update, train_config.TrainConfig]] = {
  "sgd": (sgd, dataclasses.replace(RUN, momentum=0.5)),
  "nesterov": (nesterov, dataclasses.replace(RUN, momentum=0.5, nesterov=True)),
  "adamw": (adamw, dataclasses.replace(RUN, optimizer="adamw", beta1=0.8, beta2=0.9)),
  "lamb": (lamb, dataclasses.replace(RUN, optimizer="lamb", beta1=0.8, beta2=0.9)),
}


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("replicas", [1, 2])
def test_three_updates_are_those_of_the_paper_on_every_replica(
  name: str, replicas: int, two_halves: tf.distribute.Strategy
):
  reference, run = UPDATES[name]
  run = dataclasses.replace(run, weight_decay=DECAY)
  strategy = one() if replicas == 1 else two_halves
  with strategy.scope():
    variables = [tf.Variable(value, name=name) for name, value in FIRST.items()]
    optimizer = optimizers.build(resolve(run), variables)

  def update(number: tf.Tensor) -> None:
    gradients = [
      tf.stack([gradients[name] for gradients in GRADIENTS])[number] for name in FIRST
    ]
    decayed = optimizers.with_l2(
      gradients, variables, optimizer=run.optimizer, weight_decay=DECAY
    )
    optimizers.apply(optimizer, zip(decayed, variables, strict=True))

  @tf.function
  def train() -> None:
    optimizers.set_learning_rate(optimizer, tf.constant(RATE))
    for number in tf.range(len(GRADIENTS)):
      strategy.run(update, args=(number,))

  train()
  for name, variable in zip(FIRST, variables, strict=True):
    expected = np.array(FIRST[name])
    slots = {key: np.zeros_like(expected) for key in "mv"}
    for step, gradients in enumerate(GRADIENTS, 1):
      decays = not name.endswith("bias")
      reference(expected, slots, np.array(gradients[name]), step, decays)
    for copy in strategy.experimental_local_results(variable):
      np.testing.assert_allclose(copy.numpy(), expected, rtol=2e-5, atol=1e-6)


def saved(built: train_state.TrainState, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """All numbers that a checkpoint of the state holds."""
  path = str(folder / "all")
  built.checkpoint().write(path)
  reader = tf.train.load_checkpoint(path)
  return {
    name: reader.get_tensor(name)
    for name in reader.get_variable_to_shape_map()
    if name != "_CHECKPOINTABLE_OBJECT_GRAPH"
  }


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
  assert left.keys() == right.keys()
  for name, value in left.items():
    np.testing.assert_array_equal(value, right[name], err_msg=name)


def largest_move(before: dict[str, np.ndarray], group: list[tf.Variable]) -> float:
  """How far the first step moved what does not decay."""
  return max(
    np.abs(variable.numpy() - before[variable.name]).max()
    for variable in group
    if variable.shape.rank == 1
  )


MODES: dict[str, dict[str, Any]] = {
  "sgd": {},
  "nesterov in float16": {"nesterov": True, "policy": "mixed_float16"},
  "adamw, averaged": {"optimizer": "adamw", "clip_norm": 1.0, "ema_decay": 0.5},
  "lamb": {"optimizer": "lamb"},
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_gone_on_with_from_a_checkpoint_is_the_undisturbed_run_to_the_bit(
  mode: str, tmp_path: pathlib.Path
):
  run = dataclasses.replace(RUN, **MODES[mode])
  built = build(one(), run)
  groups = built.head_variables, built.backbone_variables
  first = {each.name: each.numpy() for group in groups for each in group}
  phase = schedules.Phase("full", 0, 100, 0, 0.02, 0.005, tf.ones_like)
  train = steps.trainer(one(), built, run, phase)
  if built.loss_scale.is_dynamic:
    built.loss_scale.scale.assign(256.0)  # nothing overflows, and it grows in step 5
    built.loss_scale.good_steps.assign(loss_scale.GROW_EVERY - 5)
  train(1)
  if "optimizer" in MODES[mode]:  # their first step is the rate, and its sign g's
    moved = [largest_move(first, group) for group in groups]
    np.testing.assert_allclose(moved, [0.02, 0.005], rtol=1e-3)
  train(2)
  checkpoints.save(built.checkpoint(), str(tmp_path), step=3, is_chief=True, facts={})
  at_three = saved(built, tmp_path)
  rows = train(2)
  at_five = saved(built, tmp_path)
  if built.loss_scale.is_dynamic:
    assert steps.column(rows, "next_loss_scale").tolist() == [256.0, 512.0]

  # another process restores it all, and what goes on from there is the same
  fresh = build(one(), dataclasses.replace(run, seed=9))
  for each in (fresh, built):
    found = checkpoints.at(str(tmp_path), 3)
    checkpoints.restore(each.checkpoint(), found, is_whole=True)
    assert_same(saved(each, tmp_path), at_three)
  np.testing.assert_array_equal(train(2), rows)
  assert_same(saved(built, tmp_path), at_five)
