"""TF_CONFIG, as TensorFlow and Kubeflow write it, to a cluster."""

import json
import re
from typing import Any

from facedist import errors
from facedist.cluster.description import Cluster

_SHAPE = (
  '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
)


def read(text: str) -> Cluster:
  """Returns the cluster that TF_CONFIG describes.

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
      f"TF_CONFIG={text!r:.120} cannot be read ({error}); write {_SHAPE}."
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
  return Cluster(workers, workers.index(jobs[kind][index]), origin="TF_CONFIG")


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
