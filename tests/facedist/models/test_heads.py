import numpy as np
import pytest
import tensorflow as tf

from facedist.models.heads import replicated
from facedist.models.heads.margins import MARGINS


def test_cosines_ignore_the_norms_of_embeddings_and_class_weights():
  embeddings = tf.constant([[3.0, 0.0], [5.0, 5.0]])
  weights = tf.constant([[0.1, 0.0], [0.0, 7.0], [-2.0, 0.0]])
  half = np.sqrt(0.5)
  expected = [[1.0, 0.0, -1.0], [half, half, -half]]
  np.testing.assert_allclose(
    replicated.cosines(embeddings, weights), expected, atol=1e-6
  )


def test_cosines_are_the_same_whichever_factor_is_on_the_left(
  monkeypatch: pytest.MonkeyPatch,
):
  rng = np.random.default_rng(2)
  embeddings, weights = rng.normal(size=(3, 8)), rng.normal(size=(50, 8))
  on_cpu = replicated.cosines(tf.constant(embeddings), tf.constant(weights))
  monkeypatch.setattr(tf.config, "list_logical_devices", lambda _: ["GPU:0"])
  on_gpu = replicated.cosines(tf.constant(embeddings), tf.constant(weights))
  np.testing.assert_allclose(on_cpu, on_gpu, rtol=1e-12)


def test_a_zero_embedding_has_cosine_zero_and_a_finite_gradient():
  embeddings = tf.zeros((1, 4))
  weights = tf.ones((2, 4))
  with tf.GradientTape() as tape:
    tape.watch(embeddings)
    cosines = replicated.cosines(embeddings, weights)
  np.testing.assert_array_equal(cosines, [[0.0, 0.0]])
  assert np.isfinite(tape.gradient(cosines, embeddings)).all()


def test_cosines_are_float32_under_half_precision_embeddings():
  embeddings = tf.ones((1, 4), tf.float16)
  assert replicated.cosines(embeddings, tf.ones((2, 4))).dtype == tf.float32


def test_class_weights_are_a_function_of_the_seed():
  def weights(seed: int) -> np.ndarray:
    head = replicated.MarginHead(num_identities=3, embedding_size=4, seed=seed)
    return head.class_weights.numpy()

  np.testing.assert_array_equal(weights(1), weights(1))
  assert not np.array_equal(weights(1), weights(2))


@pytest.mark.parametrize("row_shape", [(3,), (2, 3)])
def test_the_gradient_of_cosines_is_their_finite_difference(row_shape: tuple[int, ...]):
  rng = np.random.default_rng(4)
  embeddings = tf.constant(rng.normal(size=(4, 3)))
  weights = tf.constant(0.01 * rng.normal(size=(5, *row_shape)))
  factors = rng.normal(size=(4, 5))

  def weighted(embeddings: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(factors * replicated.cosines(embeddings, weights))

  found, expected = tf.test.compute_gradient(weighted, [embeddings, weights], 1e-6)
  for left, right in zip(found, expected, strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


def head_of(
  kind: str, *, scale: float = 64.0, **hyperparameters: float
) -> replicated.MarginHead:
  """A head of three identities with its defaults, unless others are given."""
  return replicated.MarginHead(
    num_identities=3,
    embedding_size=4,
    seed=0,
    margin=MARGINS[kind](**hyperparameters),
    scale=scale,
    sub_centres=MARGINS[kind].default_sub_centres,
  )


def test_magface_adds_its_weighted_penalty_to_the_loss():
  embeddings = tf.constant([[50.0, 0.0, 0.0, 0.0]])
  labels = tf.constant([0])
  losses = [
    head.losses(head.margin_input(embeddings, labels), labels).numpy()
    for head in (
      head_of("magface", penalty_weight=35.0),
      head_of("magface", penalty_weight=0.0),
    )
  ]
  np.testing.assert_allclose(
    losses[0] - losses[1], [35 * (50 / 12100 + 0.02)], rtol=1e-4
  )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", MARGINS)
def test_no_head_ever_gives_a_nan(kind: str, dtype: str):
  head = head_of(kind)
  axis = np.eye(4, dtype=np.float32)
  weights = np.stack([axis[0], axis[1], 0 * axis[0]])  # the last one is zero
  head.class_weights.assign(
    np.broadcast_to(
      weights if head.class_weights.shape.rank == 2 else weights[:, None],
      head.class_weights.shape,
    )
  )
  # cosines of 1, -1 and 0 with the own class weight, zero, tiny, huge and mixed vectors
  rows = [
    axis[0],
    -axis[0],
    axis[1],
    0 * axis[0],
    6e-8 * axis[0],
    6e4 * axis[0],
    [1] * 4,
  ]
  with tf.GradientTape() as tape:
    embeddings = tf.cast(tf.constant(np.stack(rows * 2), tf.float32), dtype)
    tape.watch(embeddings)
    labels = tf.repeat(tf.constant([0, 2]), len(rows))
    inputs = head.margin_input(embeddings, labels)
    if head.running_statistics is not None:
      inputs = head.with_next_statistics(inputs, head.margin.batch_sums(inputs))
    losses = head.losses(inputs, labels)
  assert losses.dtype == tf.float32
  assert np.isfinite(losses).all()
  assert np.isfinite(inputs.running_statistics).all()
  by_embedding, by_weight = tape.gradient(losses, [embeddings, head.class_weights])
  assert np.isfinite(tf.cast(by_embedding, tf.float32)).all()
  assert np.isfinite(by_weight).all()


def test_running_statistics_that_would_not_be_finite_stay():
  head = head_of("adaface")
  inputs = head.margin_input(tf.ones([2, 4]), tf.zeros([2], tf.int32))
  after = head.with_next_statistics(inputs, tf.constant([2.0, np.nan, 1.0]))
  np.testing.assert_array_equal(after.running_statistics, [20.0, 100.0])


def test_only_heads_with_running_statistics_have_a_variable_for_them():
  sizes = {kind: len(head_of(kind).read_statistics()) for kind in MARGINS}
  assert {kind: size for kind, size in sizes.items() if size} == {
    "curricularface": 1,
    "adaface": 2,
  }
  assert [variable.name for variable in head_of("cosface").variables] == ["centres:0"]
