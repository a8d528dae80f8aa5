"""No head: no class centres, for embeddings that a metric loss alone trains."""

import tensorflow as tf

from facedist.models.head import Head, Verdict


class NoHead(Head):
  """Has no loss of its own and measures nothing."""

  def judge(
    self,
    embeddings: tf.Tensor,
    labels: tf.Tensor,
    *,
    step: tf.Tensor | None = None,
    positives: tf.Tensor | None = None,
  ) -> Verdict:
    """Returns losses of 0; what only class centres can tell is not a number."""
    unknown = tf.fill(tf.shape(labels), float("nan"))
    return Verdict(
      losses=tf.zeros_like(unknown),
      target=unknown,
      is_correct=unknown,
      is_true_positive=unknown,
      is_false_positive=unknown,
      memory=self.current_memory(),
    )
