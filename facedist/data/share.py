"""How the replicas of all workers share each global batch: in contiguous slices."""

import dataclasses

import numpy as np

from facedist import errors


@dataclasses.dataclass(frozen=True)
class Share:
  """One worker's part of every global batch: a contiguous slice for each replica."""

  global_batch: int
  worker: int
  num_workers: int
  local_replicas: int

  @property
  def batch(self) -> int:
    """The batch of one replica; UsageError if the global batch does not divide."""
    replicas = self.num_workers * self.local_replicas
    if self.global_batch % replicas:
      nearest = max(1, round(self.global_batch / replicas)) * replicas
      raise errors.UsageError(
        f"--global_batch={self.global_batch} does not divide over {replicas} replicas "
        f"({self.num_workers} workers x {self.local_replicas}); try "
        f"--global_batch={nearest}."
      )
    return self.global_batch // replicas

  def starts(self, elements: np.ndarray) -> np.ndarray:
    """Returns int64[n], the first position of each element in the stream of batches."""
    steps, replicas = np.divmod(elements, self.local_replicas)
    places = (self.worker * self.local_replicas + replicas) * self.batch
    return steps * self.global_batch + places

  def positions(self, elements: np.ndarray) -> np.ndarray:
    """Returns int64[n, batch], the positions of each element's samples."""
    return self.starts(elements)[:, None] + np.arange(self.batch)
