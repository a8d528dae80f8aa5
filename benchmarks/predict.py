"""Predicts the training rate of several GPUs from the step time of one.

A step on k GPUs takes as long as on one, plus the sum of the gradients. In a ring every
GPU sends 2 (k - 1) / k times the bytes of all gradients, at the rate of the slowest
link. Nothing overlaps, the GPUs are equally fast, and input is not counted.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Prediction:
  """A training step on several GPUs.

  Attributes:
    gpus: How many share the step; each has the batch of the measured one.
    sent_bytes: What each GPU sends in a step.
    step_seconds: Time of a step.
    images_per_second: Rate of all GPUs together.
    efficiency: That rate over `gpus` times the rate of one.
  """

  gpus: int
  sent_bytes: float
  step_seconds: float
  images_per_second: float
  efficiency: float


def predict(
  *,
  gpus: int,
  batch_per_gpu: int,
  one_gpu_seconds: float,
  gradient_bytes: int,
  bytes_per_second: float,
) -> Prediction:
  """Predicts a step whose gradients are summed in a ring.

  Args:
    gpus: How many share the step.
    batch_per_gpu: Images of a GPU in a step.
    one_gpu_seconds: Measured time of that step on one GPU.
    gradient_bytes: Bytes of all gradients that are summed.
    bytes_per_second: What a GPU can send over its slowest link, in one direction.
  """
  sent = 2 * (gpus - 1) / gpus * gradient_bytes
  seconds = one_gpu_seconds + sent / bytes_per_second
  return Prediction(
    gpus=gpus,
    sent_bytes=sent,
    step_seconds=seconds,
    images_per_second=gpus * batch_per_gpu / seconds,
    efficiency=one_gpu_seconds / seconds,
  )
