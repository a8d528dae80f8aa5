"""Who am I, and with whom: the environment to a cluster of workers."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from facedist import errors

_TF_CONFIG_SHAPE = (
  '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
)


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The workers of one training job, and which of them this process is.

  Attributes:
    workers: `host:port` of every worker, the chief first; empty for a process that
      trains by itself.
    index: This process's place among the workers.
  """

  workers: tuple[str, ...] = ()
  index: int = 0

  @property
  def num_workers(self) -> int:
    """Number of processes that train together, at least one."""
    return max(1, len(self.workers))

  @property
  def is_chief(self) -> bool:
    """Whether this worker writes what only one may write."""
    return self.index == 0


def from_environment(environment: Mapping[str, str] = os.environ) -> Cluster:
  """Returns the cluster that the environment describes; none is a process by itself.

  Raises:
    errors.UsageError: TF_CONFIG is wrong or makes this process no worker.
  """
  if text := environment.get("TF_CONFIG"):
    return from_tf_config(text)
  return Cluster()


def from_tf_config(text: str) -> Cluster:
  """Reads TF_CONFIG as TensorFlow and Kubeflow write it.

  The chief of a cluster that names one is worker 0, its workers follow.

  Raises:
    errors.UsageError: It is wrong or makes this process no worker.
  """
  try:
    content = json.loads(text)
    jobs, task = content.get("cluster", {}), content.get("task", {})
    workers = tuple(jobs.get("chief", [])) + tuple(jobs.get("worker", []))
    kind, index = task.get("type", "worker"), int(task.get("index", 0))
  except (ValueError, TypeError, AttributeError) as error:
    raise errors.UsageError(
      f"TF_CONFIG={text!r:.120} cannot be read ({error}); write {_TF_CONFIG_SHAPE}."
    ) from error
  if kind == "evaluator":
    raise errors.UsageError(
      "TF_CONFIG makes this process an evaluator, which does not train; run "
      "python -m facedist.evaluate there."
    )
  if kind not in ("chief", "worker"):
    raise errors.UsageError(
      f"TF_CONFIG has task type {kind!r}; only chief and worker can train."
    )
  if not workers:
    return Cluster()
  _check_addresses(workers)
  if not 0 <= index < len(jobs.get(kind, [])):
    raise errors.UsageError(
      f"TF_CONFIG has task {kind} {index}, but its cluster has "
      f"{len(jobs.get(kind, []))} of that type, counted from 0."
    )
  return Cluster(workers, workers.index(jobs[kind][index]))


def _check_addresses(workers: tuple[Any, ...]) -> None:
  """Raises UsageError unless every worker has a `host:port` of its own."""
  for worker in workers:
    if not (isinstance(worker, str) and re.fullmatch(r"\S+:[0-9]+", worker)):
      raise errors.UsageError(
        f"TF_CONFIG has the worker address {worker!r}; write host:port."
      )
    if workers.count(worker) > 1:
      raise errors.UsageError(
        f"TF_CONFIG has the worker address {worker!r} twice; each worker needs a "
        "port of its own."
      )
