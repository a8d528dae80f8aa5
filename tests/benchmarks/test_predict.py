import pytest

from benchmarks import predict


def test_a_prediction_worked_by_hand():
  # Each of 4 GPUs sends 2 · 3/4 · 200 = 300 bytes, at 600 a second: half a second.
  found = predict.predict(
    gpus=4,
    batch_per_gpu=10,
    one_gpu_seconds=1.5,
    gradient_bytes=200,
    bytes_per_second=600.0,
  )
  assert found.sent_bytes == pytest.approx(300)
  assert found.step_seconds == pytest.approx(2.0)
  assert found.images_per_second == pytest.approx(20)
  assert found.efficiency == pytest.approx(0.75)


def test_one_gpu_sends_nothing():
  found = predict.predict(
    gpus=1,
    batch_per_gpu=8,
    one_gpu_seconds=0.5,
    gradient_bytes=10**9,
    bytes_per_second=1.0,
  )
  assert (found.sent_bytes, found.images_per_second) == (0, 16)
