import numpy as np
import pytest
import tensorflow as tf

from facedist.models.heads import replicated
from facedist.models.heads.margins import MARGINS, Knobs


def test_cosines_ignore_the_lengths_of_embeddings_and_centres():
  embeddings = tf.constant([[3.0, 0.0], [5.0, 5.0]])
  centres = tf.constant([[0.1, 0.0], [0.0, 7.0], [-2.0, 0.0]])
  half = np.sqrt(0.5)
  expected = [[1.0, 0.0, -1.0], [half, half, -half]]
  np.testing.assert_allclose(
    replicated.cosines(embeddings, centres), expected, atol=1e-6
  )


def test_cosines_are_the_same_whichever_factor_stands_on_the_left(
  monkeypatch: pytest.MonkeyPatch,
):
  rng = np.random.default_rng(2)
  embeddings, centres = rng.normal(size=(3, 8)), rng.normal(size=(50, 8))
  on_cpu = replicated.cosines(tf.constant(embeddings), tf.constant(centres))
  monkeypatch.setattr(tf.config, "list_logical_devices", lambda _: ["GPU:0"])
  on_gpu = replicated.cosines(tf.constant(embeddings), tf.constant(centres))
  np.testing.assert_allclose(on_cpu, on_gpu, rtol=1e-12)


def test_a_zero_embedding_has_cosine_zero_and_a_finite_gradient():
  embeddings = tf.zeros((1, 4))
  centres = tf.ones((2, 4))
  with tf.GradientTape() as tape:
    tape.watch(embeddings)
    cosines = replicated.cosines(embeddings, centres)
  np.testing.assert_array_equal(cosines, [[0.0, 0.0]])
  assert np.isfinite(tape.gradient(cosines, embeddings)).all()


def test_cosines_are_float32_under_half_precision_embeddings():
  embeddings = tf.ones((1, 4), tf.float16)
  assert replicated.cosines(embeddings, tf.ones((2, 4))).dtype == tf.float32


def test_centres_are_a_function_of_the_seed():
  def centres(seed: int) -> np.ndarray:
    head = replicated.MarginHead(num_identities=3, embedding_size=4, seed=seed)
    return head.centres.numpy()

  np.testing.assert_array_equal(centres(1), centres(1))
  assert not np.array_equal(centres(1), centres(2))


def test_an_identitys_nearest_sub_centre_is_its_cosine():
  rng = np.random.default_rng(0)
  embeddings, centres = rng.normal(size=(4, 6)), rng.normal(size=(5, 3, 6))
  lengths = np.linalg.norm(embeddings, axis=-1)[:, None, None]
  products = np.einsum("be,ike->bik", embeddings, centres)
  expected = (products / lengths / np.linalg.norm(centres, axis=-1)).max(axis=-1)
  value = replicated.cosines(tf.constant(embeddings), tf.constant(centres))
  np.testing.assert_allclose(value, expected, rtol=1e-10)


@pytest.mark.parametrize("row_shape", [(3,), (2, 3)])
def test_the_gradient_of_cosines_is_their_finite_difference(row_shape: tuple[int, ...]):
  rng = np.random.default_rng(4)
  embeddings = tf.constant(rng.normal(size=(4, 3)))
  centres = tf.constant(0.01 * rng.normal(size=(5, *row_shape)))
  weights = rng.normal(size=(4, 5))

  def weighted(embeddings: tf.Tensor, centres: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(weights * replicated.cosines(embeddings, centres))

  found, expected = tf.test.compute_gradient(weighted, [embeddings, centres], 1e-6)
  for left, right in zip(found, expected, strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


def head_of(kind: str, **knobs: float) -> replicated.MarginHead:
  """A head of three identities with its usual margins, unless others are given."""
  usual = dict(
    zip(("margin", "margin2", "margin3"), MARGINS[kind].margins, strict=False)
  )
  return replicated.MarginHead(
    num_identities=3,
    embedding_size=4,
    seed=0,
    kind=kind,
    knobs=Knobs(**{**usual, **knobs}),
    sub_centres=MARGINS[kind].sub_centres,
  )


@pytest.mark.parametrize("kind", MARGINS)
def test_a_margin_changes_the_target_logit_and_scale_multiplies_all(kind: str):
  head = head_of(kind, scale=8.0, norm_weight=0.0)
  embeddings = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
  labels = np.array([0, 2, 1, 1, 0])
  seen = head.see(tf.constant(embeddings), tf.constant(labels))
  logits, cosines = head.logits(seen).numpy(), seen.cosines.numpy()
  rows = np.arange(5)
  np.testing.assert_array_equal(seen.target, cosines[rows, labels])
  np.testing.assert_allclose(seen.norms, np.linalg.norm(embeddings, axis=1), rtol=1e-6)
  others = np.ones((5, 3), bool)
  others[rows, labels] = False
  margined = logits[rows, labels, None] / 8
  if kind == "curricularface":  # t is 0 at first: a hard negative is squared
    cosines = np.where(cosines > margined, cosines**2, cosines)
  np.testing.assert_allclose(logits[others], 8 * cosines[others], rtol=1e-4, atol=1e-6)
  changed = margined[:, 0] != seen.target.numpy()
  assert changed.all() == (kind != "softmax")
  exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
  probabilities = exponents / exponents.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(
    head.losses(seen, tf.constant(labels)),
    -np.log(probabilities[rows, labels]),
    rtol=1e-4,
    atol=1e-6,
  )


def test_cosface_lowers_the_target_by_its_margin_times_the_scale():
  head = head_of("cosface", scale=64.0, margin=0.25)
  head.centres.assign([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0]])
  seen = head.see(tf.constant([[0.6, 0.0, 0.8, 0.0]]), tf.constant([2]))
  np.testing.assert_allclose(head.logits(seen), [[38.4, 0.0, 35.2]], rtol=1e-6)


def test_magface_adds_its_weighted_penalty_to_the_loss():
  embeddings = tf.constant([[50.0, 0.0, 0.0, 0.0]])
  labels = tf.constant([0])
  losses = [
    head.losses(head.see(embeddings, labels), labels).numpy()
    for head in (
      head_of("magface", norm_weight=35.0),
      head_of("magface", norm_weight=0.0),
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
  centres = np.stack([axis[0], axis[1], 0 * axis[0]])  # the last one is zero
  head.centres.assign(
    np.broadcast_to(
      centres if head.centres.shape.rank == 2 else centres[:, None], head.centres.shape
    )
  )
  # cosines of 1, -1 and 0 with the own centre, zero, tiny, huge and mixed vectors
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
    seen = head.see(embeddings, labels)
    sums = head.sums(seen)
    if sums is not None:
      seen = head.next_memory(seen, sums)
    losses = head.losses(seen, labels)
  assert losses.dtype == tf.float32
  assert np.isfinite(losses).all()
  assert np.isfinite(seen.memory).all()
  by_embedding, by_centre = tape.gradient(losses, [embeddings, head.centres])
  assert np.isfinite(tf.cast(by_embedding, tf.float32)).all()
  assert np.isfinite(by_centre).all()


def test_a_memory_that_would_not_be_finite_stays():
  head = head_of("adaface")
  seen = head.see(tf.ones([2, 4]), tf.zeros([2], tf.int32))
  after = head.next_memory(seen, tf.constant([2.0, np.nan, 1.0]))
  np.testing.assert_array_equal(after.memory, [20.0, 100.0])


def test_only_heads_that_remember_have_a_memory_in_their_checkpoints():
  sizes = {kind: head_of(kind).memory_size for kind in MARGINS}
  assert {kind: size for kind, size in sizes.items() if size} == {
    "curricularface": 1,
    "adaface": 2,
  }
  assert [variable.name for variable in head_of("cosface").variables] == ["centres:0"]
