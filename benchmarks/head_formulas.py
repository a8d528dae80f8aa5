"""What a margin head costs a replica, by formula: memory, traffic, multiply-adds.

With C identities of E floats, k replicas and a global batch of B images, a replica
holds r rows: C where the head is replicated, C / k where it is sharded. A step trains n
of them: all, or with a sample of fraction q about q · r + (1 - q) · B / k. The replica
compares b embeddings with them: its own B / k, or, sharded, the B of all.

- Memory in bytes: 4 E r for the class weights and for each slot; 4 E n for each copy of
  the rows that a step works with; 4 b n for each copy of the logits.
- A sum of x bytes over the replicas has each of them send 2 (k - 1) / k · x in a ring.
  The network's gradient is summed, and the class weights' too (4 E C bytes) where all
  replicas have them. Sharded, the embeddings with their labels are summed into the
  global batch, and so is their gradient: 8 B (E + 2) bytes; and 48 B for softmax,
  metrics and gradients.
- Multiply-adds: 3 b n E, for the cosines and the gradients by either factor.

Partial FC's paper (arXiv:2203.15565) counts the same way.
"""

import dataclasses
import math

_FLOAT_BYTES = 4
_WORK_COPIES = {"replicated": 4, "sharded": 5, "sampled": 6}
"""Float32[n, E] that are alive at once: directions, the gradient, what the update
computes; sampled, the rows themselves and their slots too, which are copies."""
_LOGIT_COPIES = 5
"""Float32[b, n] that are alive at once, of cosines, logits, powers and gradients."""
_SOFTMAX_BYTES = 48  # of each image: eight floats and two float64


@dataclasses.dataclass(frozen=True)
class Job:
  """A training step of which the head is a part.

  Attributes:
    sharding: replicated, sharded or sampled.
    identities: C, of all replicas.
    embedding: E, floats of an embedding.
    global_batch: B, images a step of all replicas.
    replicas: k.
    slots: Numbers that the optimizer keeps of every weight.
    sample_rate: q, the fraction of other identities in a step of `sampled`.
    network_parameters: Weights of backbone and embedding layer.
  """

  sharding: str
  identities: int
  embedding: int = 512
  global_batch: int = 64
  replicas: int = 1
  slots: int = 1
  sample_rate: float = 0.1
  network_parameters: int = 0

  @property
  def is_replicated(self) -> bool:
    """Whether every replica has all class weights."""
    return self.sharding == "replicated"

  @property
  def rows(self) -> int:
    """Rows that a replica holds, r."""
    replicas = 1 if self.is_replicated else self.replicas
    return math.ceil(self.identities / replicas)

  @property
  def step_rows(self) -> float:
    """Rows of a replica that a step trains, n; the batch's identities are distinct."""
    if self.sharding != "sampled":
      return self.rows
    own_labels = min(self.rows, self.global_batch / self.replicas)
    return self.sample_rate * self.rows + (1 - self.sample_rate) * own_labels

  @property
  def compared(self) -> float:
    """Embeddings that a replica compares with its rows, b."""
    return self.global_batch / (self.replicas if self.is_replicated else 1)


def state_bytes(job: Job) -> int:
  """Returns the bytes of a replica's class weights and their slots."""
  return _FLOAT_BYTES * job.rows * job.embedding * (1 + job.slots)


def memory_bytes(job: Job) -> float:
  """Returns the most bytes that the head takes on a replica in a step."""
  work = job.step_rows * job.embedding * _WORK_COPIES[job.sharding]
  logits = job.compared * job.step_rows * _LOGIT_COPIES
  return state_bytes(job) + _FLOAT_BYTES * (work + logits)


def sent_bytes(job: Job) -> float:
  """Returns the bytes that a replica sends in a step, of network and head."""
  summed = _FLOAT_BYTES * job.network_parameters
  if job.is_replicated:
    summed += _FLOAT_BYTES * job.identities * job.embedding
  else:
    # two floats of 16 bits each carry a label
    gathered = 2 * _FLOAT_BYTES * (job.embedding + 2)
    summed += job.global_batch * (gathered + _SOFTMAX_BYTES)
  return 2 * (job.replicas - 1) / job.replicas * summed


def multiply_adds(job: Job) -> float:
  """Returns the multiply-adds of a replica's head in a step."""
  return 3 * job.compared * job.step_rows * job.embedding


def predictions(
  *,
  identities: tuple[int, ...] = (10**6, 10**7, 10**8),
  replicas: tuple[int, ...] = (8, 64, 512),
  batch_a_replica: int = 64,
  embedding: int = 512,
  network_parameters: int = 0,
) -> list[Job]:
  """Returns the steps of larger clusters, each way of sharding for each size."""
  return [
    Job(
      sharding=sharding,
      identities=count,
      embedding=embedding,
      global_batch=number * batch_a_replica,
      replicas=number,
      network_parameters=network_parameters,
    )
    for count in identities
    for number in replicas
    for sharding in _WORK_COPIES
  ]
