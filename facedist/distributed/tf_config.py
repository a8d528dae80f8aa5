"""Reads the cluster of TF_CONFIG, as TensorFlow and Kubeflow write it."""

import json
from typing import Any

from facedist import errors
from facedist.distributed.cluster import Cluster

_SHAPE = (
  '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
)
_EMPTY: tuple[dict[str, Any], ...] = (
  {},
  {"cluster": {}},
)  # what some schedulers give a single process

# Kubeflow and Google Cloud write more than `cluster` and `task`; that does not describe
# the workers. Any other name is probably a mistake.
_KEYS = ("cluster", "task", "environment", "job", "rpc_layer")
_TASK_KEYS = ("type", "index", "trial", "cloud")
_JOBS = ("chief", "worker", "ps", "evaluator")


def read(text: str) -> Cluster:
  """Returns the cluster that TF_CONFIG describes; one without workers if it is empty.

  The chief of a cluster that names one is worker 0, its workers follow. A job is a list
  of addresses or, as in tf.train.ClusterSpec, an object of them by index.

  Raises:
    errors.UsageError: It is incomplete, has unknown names, contradicts itself, or does
      not make this process a worker.
  """
  if not text.strip():
    return Cluster()
  content = _parse(text)
  if content in _EMPTY:
    return Cluster()
  _check_keys(content, _KEYS, "")
  task = _object(content, "task", "")
  _check_keys(task, _TASK_KEYS, "task.")
  kind, index = _kind(task), _index(task)
  jobs = _object(content, "cluster", "")
  if "master" in jobs:
    raise _wrong("has TensorFlow 1's job 'master'; name it chief, in cluster and task")
  _check_keys(jobs, _JOBS, "cluster.")
  if content.get("rpc_layer", "grpc") != "grpc":
    raise _wrong(f"has rpc_layer {content['rpc_layer']!r:.40}; leave it out")
  addresses = {job: _addresses(jobs[job], job) for job in jobs}
  chiefs, others = addresses.get("chief", []), addresses.get("worker", [])
  if len(chiefs) > 1:
    raise _wrong(f"has {len(chiefs)} chiefs; a cluster has one, the others are workers")
  own = addresses.get(kind, [])
  if index >= len(own):
    raise _wrong(
      f"has task {kind} {index}, but its cluster has {len(own)} of that type, counted "
      f"from 0; write {_SHAPE}"
    )
  place = index if kind == "chief" else len(chiefs) + index
  return Cluster((*chiefs, *others), place, origin="TF_CONFIG")


def _parse(text: str) -> dict[str, Any]:
  """Returns the JSON object; an object must not contain a name twice."""

  def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
      raise ValueError("an object contains a name twice")
    return content

  try:
    content = json.loads(text, object_pairs_hook=without_repeats)
  except (ValueError, RecursionError) as error:
    raise _wrong(f"cannot be read ({error}); write {_SHAPE}", text) from error
  if not isinstance(content, dict):
    raise _wrong(f"is no JSON object; write {_SHAPE}", text)
  return content


def _object(content: dict[str, Any], name: str, where: str) -> dict[str, Any]:
  """Returns a part of TF_CONFIG that must exist and be an object."""
  if name not in content:
    raise _wrong(f"has no {where}{name}; write {_SHAPE}")
  if not isinstance(content[name], dict):
    raise _wrong(f"has {where}{name} that is no JSON object; write {_SHAPE}")
  return dict(content[name])


def _check_keys(content: dict[str, Any], known: tuple[str, ...], where: str) -> None:
  """Raises UsageError if an object has an unknown name."""
  if "sparseCluster" in content:
    raise _wrong(
      "has Kubeflow's sparseCluster, which names one worker alone; set "
      "enableDynamicWorker: false in the TFJob"
    )
  for name in content:
    if name not in known:
      names = ", ".join(where + one for one in known)
      raise _wrong(f"has {where + name!r:.60}, which is unknown; known are {names}")


def _kind(task: dict[str, Any]) -> str:
  """Returns the job of this task, which must be one that trains."""
  if "type" not in task:
    raise _wrong(f"has no task.type; write {_SHAPE}")
  kind = task["type"]
  if kind == "evaluator":
    raise _wrong(
      "makes this process an evaluator, which does not train; run python -m "
      "facedist.evaluate there"
    )
  if kind == "master":
    raise _wrong("has TensorFlow 1's task 'master'; name it chief, in cluster and task")
  if kind not in ("chief", "worker"):
    raise _wrong(f"has task type {kind!r:.40}; only chief and worker can train")
  return str(kind)


def _index(task: dict[str, Any]) -> int:
  """Returns this task's index in its job, which may be written as text."""
  if "index" not in task:
    raise _wrong(f"has no task.index; write {_SHAPE}")
  index = task["index"]
  number = _whole_number(index)
  if number is None:
    raise _wrong(f"has task.index {index!r:.40}; write a whole number, 0 or more")
  return number


def _addresses(job: Any, name: str) -> list[Any]:
  """Returns the addresses of a job, in the order of their indices."""
  if isinstance(job, list):
    return job
  if not isinstance(job, dict):
    raise _wrong(f"has {job!r:.60} as cluster.{name}; write a list of host:port")
  by_index = {_whole_number(index): address for index, address in job.items()}
  missing = [place for place in range(len(job)) if place not in by_index]
  if missing:
    raise _wrong(
      f"has cluster.{name} with the indices {list(job)!r:.60}, but no "
      f"{missing[0]}; name every {name}, counted from 0"
    )
  return [by_index[place] for place in range(len(job))]


def _whole_number(value: Any) -> int | None:
  """Returns a number that is written as a number or as text; None for anything else."""
  if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
    return value
  is_text = isinstance(value, str) and value.isascii() and value.isdecimal()
  return int(value) if is_text and len(value) < 10 else None


def _wrong(reason: str, text: str = "") -> errors.UsageError:
  """Returns the error; `text` is TF_CONFIG, if the message should show it."""
  value = f"={text!r:.120}" if text else ""
  return errors.UsageError(f"TF_CONFIG{value} {reason}.")
