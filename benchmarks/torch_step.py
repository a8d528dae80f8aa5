"""Trains a few steps in PyTorch, for the comparison in `benchmarks/gpu.py`.

The network, the CosFace loss, SGD with momentum and weight decay, mirroring and loss
scaling are facedist's; a test compares them. What a PyTorch user would choose is
chosen: channels-last tensors, autocast, TF32 products, the fused optimizer and cuDNN's
search for the fastest convolutions.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import torch_networks
from facedist import errors
from facedist.data.readers import local_reader
from facedist.data.samplers import epoch_sampler

Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""uint8[batch, S, S, 3] RGB, int64[batch] labels, bool[batch]: which are mirrored."""

_DTYPES = {"mixed_float16": torch.float16, "mixed_bfloat16": torch.bfloat16}
_LOSS_SCALE = 2.0**15
_GROW_EVERY = 2000
_BATCHES_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Job:
  """A case and its hyperparameters, which facedist's config has; JSON to a process.

  Attributes:
    batch: Images per step of each replica.
    is_compiled: Whether torch.compile compiles the forward and the backward pass.
    input: shards or constant.
    folder: The shards.
    num_replicas: One process each.
    on_gpu: Whether replicas are GPUs; else they share the CPU.
    warm_up_steps: Steps before those that are measured.
    peak_tflops: Of a GPU in this precision, if it is known.
    margin: Of CosFace, in cosine units.
  """

  backbone: str
  batch: int
  policy: str
  is_compiled: bool
  input: str
  folder: str
  image_size: int
  num_identities: int
  warm_up_steps: int
  steps: int
  num_replicas: int
  on_gpu: bool
  peak_tflops: float | None
  embedding_size: int
  pooling: str
  dropout: float
  batch_norm_momentum: float
  margin: float
  scale: float
  learning_rate: float
  momentum: float
  nesterov: bool
  weight_decay: float


class FaceModel(nn.Module):
  """The network and its margin head; computes the mean loss of a batch."""

  def __init__(self, job: Job) -> None:
    super().__init__()
    self.network = torch_networks.FaceNetwork(
      job.backbone,
      image_size=job.image_size,
      embedding_size=job.embedding_size,
      pooling=job.pooling,
      dropout=job.dropout,
      batch_norm_momentum=job.batch_norm_momentum,
    )
    drawn = 0.01 * torch.randn(job.num_identities, job.embedding_size)
    self.class_weights = nn.Parameter(drawn)
    self.margin, self.scale = job.margin, job.scale
    self.dtype = _DTYPES.get(job.policy)

  def forward(self, images: Tensor, labels: Tensor, mirrored: Tensor) -> Tensor:
    """Takes a `Batch`; returns float32[], CosFace's cross-entropy in nats."""
    mirrors = mirrored[:, None, None, None]
    pixels = torch.where(mirrors, images.flip(2), images).float()
    with torch.autocast(
      images.device.type, dtype=self.dtype, enabled=self.dtype is not None
    ):
      embeddings = self.network(pixels)
    cosines = functional.linear(
      functional.normalize(embeddings), functional.normalize(self.class_weights)
    )
    is_target = functional.one_hot(labels, len(self.class_weights))
    return functional.cross_entropy(
      self.scale * (cosines - self.margin * is_target), labels
    )


def make_step(model: nn.Module, job: Job) -> Callable[..., Tensor]:
  """Returns a function that takes a `Batch`, updates the model and returns the loss.

  Args:
    model: A `FaceModel`, perhaps compiled or distributed.
    job: Its hyperparameters.
  """
  parameters = list(model.parameters())
  decayed = [each for each in parameters if each.dim() > 1]  # kernels, class weights
  others = [each for each in parameters if each.dim() <= 1]
  optimizer = torch.optim.SGD(
    [{"params": decayed, "weight_decay": job.weight_decay}, {"params": others}],
    lr=job.learning_rate,
    momentum=job.momentum,
    nesterov=job.nesterov,
    fused=True,
  )
  scaler = torch.amp.GradScaler(
    parameters[0].device.type,
    init_scale=_LOSS_SCALE,
    growth_interval=_GROW_EVERY,
    enabled=job.policy == "mixed_float16",
  )

  def step(images: Tensor, labels: Tensor, mirrored: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = model(images, labels, mirrored)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()

  return step


def batches(job: Job, rank: int, device: torch.device) -> Generator[Batch, None, None]:
  """Returns one replica's batches on its device, without end."""
  if job.input == "shards":
    return _shard_batches(job, rank, device)
  return _constant_batch(job, rank, device)


def _constant_batch(
  job: Job, rank: int, device: torch.device
) -> Generator[Batch, None, None]:
  """Repeats one batch of random pixels, which stays in the device's memory."""
  rng = np.random.default_rng(rank)
  shape = (job.batch, job.image_size, job.image_size, 3)
  images = rng.integers(0, 256, shape, np.uint8)
  labels = rng.integers(0, job.num_identities, job.batch)
  yield from itertools.repeat(_on_device(_tensors(images, labels, rng), device))


def _shard_batches(
  job: Job, rank: int, device: torch.device
) -> Generator[Batch, None, None]:
  """Reads as facedist does: in its order, a batch a thread, a thread a core."""
  reader = local_reader.open_reader(job.folder, "train")
  sampler = epoch_sampler.EpochSampler(
    reader.num_records, job.batch * job.num_replicas, 0
  )

  def load(step: int) -> Batch:
    samples = sampler.slice_at(step, rank * job.batch, (rank + 1) * job.batch)
    images, labels = reader.read_batch(samples.records)
    loaded = _tensors(images, labels, np.random.default_rng((step, rank)))
    if not job.on_gpu:
      return loaded
    images, labels, mirrored = (each.pin_memory() for each in loaded)
    return images, labels, mirrored

  threads = max(1, (os.cpu_count() or 1) // job.num_replicas)
  pending: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for step in itertools.count():
      pending.append(pool.submit(load, step))
      if len(pending) == threads + _BATCHES_AHEAD:
        yield _on_device(pending.popleft().result(), device)


def _tensors(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Batch:
  """Returns a batch in the host's memory; half of the images are mirrored."""
  mirrored = rng.random(len(labels)) < 0.5
  return (
    torch.from_numpy(images),
    torch.from_numpy(labels).long(),
    torch.from_numpy(mirrored),
  )


def _on_device(batch: Batch, device: torch.device) -> Batch:
  """Copies without waiting where the host's memory is pinned."""
  images, labels, mirrored = (each.to(device, non_blocking=True) for each in batch)
  return images, labels, mirrored


def measure(job: Job, rank: int = 0) -> dict[str, Any]:
  """Trains a few steps as one replica; returns what `gpu.measure` returns."""
  device = torch.device("cuda", rank) if job.on_gpu else torch.device("cpu")
  wait_for_device = torch.cuda.synchronize if job.on_gpu else lambda: None
  if job.on_gpu:
    torch.cuda.set_device(device)
  torch.manual_seed(0)
  torch.backends.cudnn.benchmark = True
  torch.set_float32_matmul_precision("high")  # TF32; cuDNN's convolutions have it
  face_model = FaceModel(job).to(device, memory_format=torch.channels_last)
  per_image = 6 * torch_networks.multiply_adds(face_model.network, job.image_size)
  model: nn.Module = face_model
  if job.num_replicas > 1:
    model = nn.parallel.DistributedDataParallel(
      model, broadcast_buffers=False, gradient_as_bucket_view=True
    )
  step = make_step(torch.compile(model) if job.is_compiled else model, job)

  def run(source: Iterator[Batch], num_steps: int) -> tuple[float, float]:
    """Returns the seconds of so many steps, and those of them spent on waiting."""
    waited, start = 0.0, time.perf_counter()
    for _ in range(num_steps):
      asked = time.perf_counter()
      batch = next(source)
      waited += time.perf_counter() - asked
      step(*batch)
    wait_for_device()
    return time.perf_counter() - start, waited

  with contextlib.closing(batches(job, rank, device)) as source:
    warm_up_seconds, _ = run(source, job.warm_up_steps)
    seconds, waited = run(source, job.steps)
  rate = job.steps * job.batch * job.num_replicas / seconds
  tflops = rate * per_image / 1e12 / job.num_replicas
  return {
    "images_per_second": rate,
    "step_seconds": seconds / job.steps,
    "warm_up_seconds": warm_up_seconds,
    "tflops_per_gpu": tflops,
    "share_of_peak": tflops / job.peak_tflops if job.peak_tflops else None,
    "peak_memory_bytes": torch.cuda.max_memory_allocated() if job.on_gpu else None,
    "input_wait": waited / seconds,
    "gradient_bytes": sum(4 * each.numel() for each in face_model.parameters()),
  }


def run_worker() -> None:
  """Measures the job in the last argument; prints the result as one line of JSON."""
  job = Job(**json.loads(sys.argv[-1]))
  if job.on_gpu and torch.cuda.device_count() < job.num_replicas:
    sys.exit(
      f"PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs, TensorFlow "
      f"{job.num_replicas}"
    )
  try:
    if job.num_replicas == 1:
      print(json.dumps(measure(job)))
      return
    with tempfile.TemporaryDirectory() as folder:
      torch.multiprocessing.spawn(
        _run_replica, (job, f"file://{folder}/rendezvous"), job.num_replicas
      )
  except torch.multiprocessing.ProcessRaisedException as error:
    sys.exit(str(error).strip().splitlines()[-1])  # of the replica's traceback
  except Exception as error:
    sys.exit(_reason(error))


def _reason(error: Exception) -> str:
  """Returns an error in a line; those of torch.compile end in advice."""
  return f"{type(error).__name__}: {errors.first_line(error)}"


def _run_replica(rank: int, job: Job, rendezvous: str) -> None:
  """Measures as one of several processes; the first prints the result."""
  backend = "nccl" if job.on_gpu else "gloo"
  try:
    torch.distributed.init_process_group(
      backend, init_method=rendezvous, rank=rank, world_size=job.num_replicas
    )
    found = measure(job, rank)
  except Exception as error:
    raise RuntimeError(_reason(error)) from None
  if rank == 0:
    print(json.dumps(found))
  torch.distributed.destroy_process_group()
