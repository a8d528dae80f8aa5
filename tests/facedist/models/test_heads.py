"""Whole heads, from embeddings and class weights to losses, against NumPy."""

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from facedist.models.heads import replicated, running_stats
from facedist.models.heads.margins import MARGINS
from tests.facedist.models.test_margins import mixed, multiplied, widened

IDENTITIES, SIZE, SCALE = 6, 8, 16.0
ANGLES = np.linspace(0.05, np.pi - 0.05, 12)  # of each label's embeddings
STATISTICS = {"curricularface": (0.3,), "adaface": (50.0, 10.0)}
PENALTY_WEIGHT = 20.0

# Target cosine of angles, norms and running statistics, with the default margins.
TARGETS: dict[str, Callable[..., np.ndarray]] = {
  "softmax": lambda angles, norms, statistics: np.cos(angles),
  "sphereface": lambda angles, norms, statistics: multiplied(angles, 1.35),
  "cosface": lambda angles, norms, statistics: np.cos(angles) - 0.35,
  "arcface": lambda angles, norms, statistics: widened(angles, 0.5),
  "combined": lambda angles, norms, statistics: multiplied(angles, 1.0, 0.3) - 0.2,
  "curricularface": lambda angles, norms, statistics: widened(angles, 0.5),
  "adaface": lambda angles, norms, statistics: mixed(angles, score(norms, *statistics)),
  "magface": lambda angles, norms, statistics: widened(
    angles, np.interp(norms, [10, 110], [0.45, 0.8])
  ),
  "subcentre_arcface": lambda angles, norms, statistics: widened(angles, 0.5),
}


def score(norms: np.ndarray, mean: float, deviation: float) -> np.ndarray:
  """AdaFace's ẑ with h = 0.333, as its authors' code has it."""
  known = np.clip(norms, 0.001, 100)
  return np.clip(0.333 * (known - mean) / (deviation + 0.001), -1, 1)


def batch_of(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Embeddings at every angle from each label's class weight, class weights, labels."""
  rng = np.random.default_rng(0)
  shape = (IDENTITIES, MARGINS[kind].default_sub_centres, SIZE)
  weights = rng.normal(size=shape)
  labels = np.repeat(np.arange(IDENTITIES), len(ANGLES))
  own = weights[labels, 0] / np.linalg.norm(weights[labels, 0], axis=1, keepdims=True)
  aside = rng.normal(size=own.shape)
  aside -= (aside * own).sum(axis=1, keepdims=True) * own
  aside /= np.linalg.norm(aside, axis=1, keepdims=True)
  angles = np.tile(ANGLES, IDENTITIES)[:, None]
  half = len(labels) // 2
  norms = np.concatenate([np.linspace(5, 45, half), np.linspace(55, 115, half)])
  embeddings = (np.cos(angles) * own + np.sin(angles) * aside) * norms[:, None]
  return embeddings, weights[:, 0] if shape[1] == 1 else weights, labels


def expected_losses(
  kind: str, embeddings: np.ndarray, weights: np.ndarray, labels: np.ndarray
) -> np.ndarray:
  """The definition, in float64."""
  statistics = STATISTICS.get(kind, ())
  norms = np.linalg.norm(embeddings, axis=1)
  by_identity = weights.reshape(IDENTITIES, -1, SIZE)
  units = by_identity / np.linalg.norm(by_identity, axis=-1, keepdims=True)
  cosines = np.einsum("be,ike->bik", embeddings / norms[:, None], units).max(axis=-1)
  rows = np.arange(len(labels))
  target = TARGETS[kind](np.arccos(cosines[rows, labels]), norms, statistics)
  if kind == "curricularface":
    is_hard = cosines > target[:, None]
    cosines = np.where(is_hard, cosines * (statistics[0] + cosines), cosines)
  cosines[rows, labels] = target
  losses = np.log(np.exp(SCALE * (cosines - target[:, None])).sum(axis=1))
  if kind == "magface":
    clipped = np.clip(norms, 10, 110)
    losses += PENALTY_WEIGHT * (clipped / 110**2 + 1 / clipped)
  return losses


def head_of(
  kind: str,
  weights: np.ndarray,
  *,
  dtype: str = "float32",
  statistics: tuple[float, ...] | None = None,
) -> replicated.MarginHead:
  """A head of these class weights and statistics, which may be float64 for the test."""
  own = {"penalty_weight": PENALTY_WEIGHT} if kind == "magface" else {}
  head = replicated.MarginHead(
    num_identities=len(weights),
    embedding_size=weights.shape[-1],
    seed=0,
    margin=MARGINS[kind](**own),
    scale=SCALE,
    sub_centres=MARGINS[kind].default_sub_centres,
  )
  head.centres = tf.Variable(weights, dtype=dtype)
  if statistics:
    head.memory = tf.Variable(statistics, dtype=dtype)
  return head


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", MARGINS)
def test_a_heads_losses_are_those_of_its_definition_at_every_angle_and_label(
  kind: str, dtype: str
):
  embeddings, weights, labels = batch_of(kind)
  given = tf.cast(tf.constant(embeddings), dtype)
  inner = "float64" if dtype == "float64" else "float32"
  head = head_of(kind, weights, dtype=inner, statistics=STATISTICS.get(kind))
  losses = head.losses(head.margin_input(given, labels), labels)
  assert losses.dtype == inner
  rounded = tf.cast(given, tf.float64).numpy()
  expected = expected_losses(kind, rounded, weights, labels)
  close = 1e-10 if dtype == "float64" else 1e-3
  np.testing.assert_allclose(losses, expected, atol=close, rtol=close / 10)


@pytest.mark.parametrize("kind", MARGINS)
def test_a_heads_gradients_are_those_of_differences(kind: str):
  embeddings, weights, labels = batch_of(kind)
  # AdaFace's score gets no gradient: here it is at its ends, where it has none
  statistics = (50.0, 0.5) if kind == "adaface" else STATISTICS.get(kind)
  head = head_of(kind, weights, dtype="float64", statistics=statistics)

  @tf.function
  def total(given: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(head.losses(head.margin_input(given, labels), labels))

  start = tf.constant(embeddings)
  with tf.GradientTape() as tape:
    tape.watch(start)
    value = total(start)
  slopes = tape.gradient(value, [start, head.class_weights])
  rng = np.random.default_rng(1)
  step = 1e-6
  for _ in range(4):
    ways = [rng.normal(size=slope.shape) for slope in slopes]
    ends = []
    for sign in (1, -1):
      head.class_weights.assign(weights + sign * step * ways[1])
      ends.append(float(total(start + sign * step * ways[0])))
    difference = (ends[0] - ends[1]) / (2 * step)
    along = sum(map(np.vdot, slopes, ways))
    np.testing.assert_allclose(along, difference, rtol=1e-6, atol=1e-5)


def test_cosines_are_the_same_whichever_factor_is_on_the_left(
  monkeypatch: pytest.MonkeyPatch,
):
  rng = np.random.default_rng(2)
  embeddings, weights = rng.normal(size=(3, 8)), rng.normal(size=(50, 8))
  on_cpu = replicated.cosines(tf.constant(embeddings), tf.constant(weights))
  monkeypatch.setattr(tf.config, "list_logical_devices", lambda _: ["GPU:0"])
  on_gpu = replicated.cosines(tf.constant(embeddings), tf.constant(weights))
  np.testing.assert_allclose(on_cpu, on_gpu, rtol=1e-12)


def test_a_zero_embedding_has_cosine_zero_and_no_gradient():
  embeddings = tf.zeros((1, 4))
  with tf.GradientTape() as tape:
    tape.watch(embeddings)
    cosines = replicated.cosines(embeddings, tf.ones((2, 4)))
  np.testing.assert_array_equal(cosines, [[0.0, 0.0]])
  np.testing.assert_array_equal(tape.gradient(cosines, embeddings), [[0.0] * 4])


def test_only_heads_with_running_statistics_have_a_variable_for_them():
  heads = {
    kind: replicated.MarginHead(
      num_identities=3, embedding_size=4, seed=0, margin=margin()
    )
    for kind, margin in MARGINS.items()
  }
  sizes = {kind: len(head.read_statistics()) for kind, head in heads.items()}
  with_statistics = {kind: size for kind, size in sizes.items() if size}
  assert with_statistics == {"curricularface": 1, "adaface": 2}
  assert [variable.name for variable in heads["cosface"].variables] == ["centres:0"]


def test_running_statistics_that_would_not_be_finite_stay():
  head = head_of("adaface", np.eye(4)[:3])
  inputs = head.margin_input(tf.ones([2, 4]), tf.zeros([2], tf.int32))
  after = head.with_next_statistics(inputs, tf.constant([2.0, np.nan, 1.0]))
  np.testing.assert_array_equal(after.running_statistics, [20.0, 100.0])


def test_a_norm_above_100_counts_as_100():
  statistics = tf.constant([20.0, 100.0])
  sums = running_stats.norm_sums(statistics, tf.constant([1e6, 0.0]))
  np.testing.assert_allclose(sums, [2, 80 - 19.999, 80**2 + 19.999**2], rtol=1e-6)


@pytest.mark.parametrize("norms", [[5.0], [5.0, 5.0, 5.0], [0.0]])
def test_one_sample_or_equal_norms_leave_the_statistics_finite(norms: list[float]):
  sums = running_stats.norm_sums(tf.constant([20.0, 1.0]), tf.constant(norms))
  after = running_stats.next_norms(tf.constant([20.0, 1.0]), sums, momentum=0.0)
  np.testing.assert_allclose(after, [max(norms[0], 1e-3), 0.0], atol=1e-5)
  score = running_stats.norm_score(after, tf.constant(norms), concentration=0.333)
  assert np.abs(score).max() < 0.01


def test_the_curriculum_moves_to_the_mean_target_cosine_of_all_replicas():
  target = np.random.default_rng(0).uniform(-1, 1, 12)
  halves = [
    running_stats.curriculum_sums(tf.constant(half))
    for half in (target[:3], target[3:])
  ]
  before = tf.constant([0.5], tf.float64)
  after = running_stats.next_curriculum(before, tf.add_n(halves), momentum=0.9)
  np.testing.assert_allclose(after, [0.9 * 0.5 + 0.1 * target.mean()], rtol=1e-12)
  first = head_of("curricularface", np.eye(4)[:3]).read_statistics()
  assert first.numpy().tolist() == [0.0]
