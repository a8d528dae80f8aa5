"""Whole heads, from embeddings and centres to losses, against NumPy and differences."""

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from facedist.models.heads import replicated
from facedist.models.heads.margins import MARGINS, Knobs
from tests.facedist.models.test_margins import mixed, multiplied, widened

IDENTITIES, SIZE, SCALE = 6, 8, 16.0
ANGLES = np.linspace(0.05, np.pi - 0.05, 12)  # of each label's embeddings
MEMORIES = {"curricularface": (0.3,), "adaface": (50.0, 20.0)}
DTYPES = ("float64", "float32", "float16", "bfloat16")

# Target cosine of angles, lengths and memory, with the usual margins.
TARGETS: dict[str, Callable[..., np.ndarray]] = {
  "softmax": lambda angles, lengths, memory: np.cos(angles),
  "sphereface": lambda angles, lengths, memory: multiplied(angles, 1.35),
  "cosface": lambda angles, lengths, memory: np.cos(angles) - 0.35,
  "arcface": lambda angles, lengths, memory: widened(angles, 0.5),
  "combined": lambda angles, lengths, memory: multiplied(angles, 1.0, 0.3) - 0.2,
  "curricularface": lambda angles, lengths, memory: widened(angles, 0.5),
  "adaface": lambda angles, lengths, memory: mixed(angles, score(lengths, *memory)),
  "magface": lambda angles, lengths, memory: widened(
    angles, np.interp(lengths, [10, 110], [0.45, 0.8])
  ),
  "subcentre_arcface": lambda angles, lengths, memory: widened(angles, 0.5),
}


def score(lengths: np.ndarray, mean: float, deviation: float) -> np.ndarray:
  """AdaFace's ẑ with h = 0.333, as its authors' code has it."""
  known = np.clip(lengths, 0.001, 100)
  return np.clip(0.333 * (known - mean) / (deviation + 0.001), -1, 1)


def batch_of(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Embeddings at every angle from the centre of every label, centres and labels."""
  rng = np.random.default_rng(0)
  shape = (IDENTITIES, MARGINS[kind].sub_centres, SIZE)
  centres = rng.normal(size=shape)
  labels = np.repeat(np.arange(IDENTITIES), len(ANGLES))
  own = centres[labels, 0] / np.linalg.norm(centres[labels, 0], axis=1, keepdims=True)
  aside = rng.normal(size=own.shape)
  aside -= (aside * own).sum(axis=1, keepdims=True) * own
  aside /= np.linalg.norm(aside, axis=1, keepdims=True)
  angles = np.tile(ANGLES, IDENTITIES)[:, None]
  half = len(labels) // 2
  lengths = np.concatenate([np.linspace(5, 45, half), np.linspace(55, 115, half)])
  embeddings = (np.cos(angles) * own + np.sin(angles) * aside) * lengths[:, None]
  return embeddings, centres[:, 0] if shape[1] == 1 else centres, labels


def expected_losses(
  kind: str, embeddings: np.ndarray, centres: np.ndarray, labels: np.ndarray
) -> np.ndarray:
  """The definition, in float64."""
  memory = MEMORIES.get(kind, ())
  lengths = np.linalg.norm(embeddings, axis=1)
  sub_centres = centres.reshape(IDENTITIES, -1, SIZE)
  units = sub_centres / np.linalg.norm(sub_centres, axis=-1, keepdims=True)
  cosines = np.einsum("be,ike->bik", embeddings / lengths[:, None], units).max(axis=-1)
  rows = np.arange(len(labels))
  target = TARGETS[kind](np.arccos(cosines[rows, labels]), lengths, memory)
  if kind == "curricularface":
    is_hard = cosines > target[:, None]
    cosines = np.where(is_hard, cosines * (memory[0] + cosines), cosines)
  cosines[rows, labels] = target
  losses = np.log(np.exp(SCALE * (cosines - target[:, None])).sum(axis=1))
  if kind == "magface":
    clipped = np.clip(lengths, 10, 110)
    losses += 35 * (clipped / 110**2 + 1 / clipped)
  return losses


def head_of(
  kind: str, centres: np.ndarray, dtype: str, memory: tuple[float, ...]
) -> replicated.MarginHead:
  """A head of these centres and this memory, which may be float64 for the test."""
  names = ("margin", "margin2", "margin3")
  usual = dict(zip(names, MARGINS[kind].margins, strict=False))
  head = replicated.MarginHead(
    num_identities=IDENTITIES,
    embedding_size=SIZE,
    seed=0,
    kind=kind,
    knobs=Knobs(**usual, scale=SCALE),
    sub_centres=MARGINS[kind].sub_centres,
  )
  head.centres = tf.Variable(centres, dtype=dtype)
  if head.memory is not None:
    head.memory = tf.Variable(memory, dtype=dtype)
  return head


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MARGINS)
def test_a_heads_losses_are_those_of_its_definition_at_every_angle_and_label(
  kind: str, dtype: str
):
  embeddings, centres, labels = batch_of(kind)
  given = tf.cast(tf.constant(embeddings), dtype)
  inner = "float64" if dtype == "float64" else "float32"
  head = head_of(kind, centres, inner, MEMORIES.get(kind, ()))
  losses = head.losses(head.see(given, tf.constant(labels)), tf.constant(labels))
  assert losses.dtype == inner
  rounded = tf.cast(given, tf.float64).numpy()
  expected = expected_losses(kind, rounded, centres, labels)
  close = 1e-10 if dtype == "float64" else 1e-3
  np.testing.assert_allclose(losses, expected, atol=close, rtol=close / 10)


@pytest.mark.parametrize("kind", MARGINS)
def test_a_heads_gradients_are_those_of_differences(kind: str):
  embeddings, centres, labels = batch_of(kind)
  # AdaFace's score gets no gradient: here it is at its ends, where it has none
  memory = (50.0, 0.5) if kind == "adaface" else MEMORIES.get(kind, ())
  head = head_of(kind, centres, "float64", memory)
  chosen = tf.constant(labels)

  @tf.function
  def total(given: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(head.losses(head.see(given, chosen), chosen))

  start = tf.constant(embeddings)
  with tf.GradientTape() as tape:
    tape.watch(start)
    value = total(start)
  slopes = tape.gradient(value, [start, head.centres])
  rng = np.random.default_rng(1)
  step = 1e-6
  for _ in range(4):
    ways = [rng.normal(size=slope.shape) for slope in slopes]
    ends = []
    for sign in (1, -1):
      head.centres.assign(centres + sign * step * ways[1])
      ends.append(float(total(start + sign * step * ways[0])))
    difference = (ends[0] - ends[1]) / (2 * step)
    along = sum(map(np.vdot, slopes, ways))
    np.testing.assert_allclose(along, difference, rtol=1e-6, atol=1e-5)
