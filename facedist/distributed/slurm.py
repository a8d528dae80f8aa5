"""Reads the cluster of a Slurm step: one worker for each task of the step.

TensorFlow's SlurmClusterResolver sorts host names as text, so that node10 comes before
node9 and the ranks are wrong. Here the hosts keep the order of the node list, which is
that of the ranks.
"""

import bisect
import itertools
import re
from collections.abc import Iterator, Mapping

from facedist import errors
from facedist.distributed.cluster import Cluster, base_port, parse_number

STEP = (
  "SLURM_STEP_NODELIST",
  "SLURM_STEP_TASKS_PER_NODE",
  "SLURM_PROCID",
  "SLURM_JOB_ID",
)
# Two jobs on one host get different ports, all below those that Linux assigns itself.
_FIRST_PORT, _PORTS_OF_A_JOB, _PORT_RANGES = 20_000, 16, 768


def read(environment: Mapping[str, str]) -> Cluster:
  """Returns the cluster of the Slurm step that this process is a task of.

  A process that srun did not start, in the batch script or in salloc's shell, is a
  single process. Worker n is the task of rank n, at port FACEDIST_PORT + its number on
  the host; without that variable the first port is computed from the job's number.

  Raises:
    errors.UsageError: Variables are missing, contradict each other, or tasks of one
      host see the same GPUs.
  """
  if not environment.get(STEP[0]):
    return _outside_srun(environment)
  missing = [name for name in STEP if not environment.get(name)]
  if missing:
    raise errors.UsageError(
      f"{STEP[0]} is set but {missing[0]} is not; start the worker with srun, which "
      "sets both, or unset them."
    )
  hosts = expand_hosts(environment[STEP[0]])
  counts = expand_counts(environment[STEP[1]])
  rank = parse_number(environment, STEP[2])
  _check_shape(environment, hosts, counts, rank)
  _check_gpus(environment, counts, rank)
  job = parse_number(environment, "SLURM_JOB_ID")
  port = base_port(
    environment,
    default=_FIRST_PORT + _PORTS_OF_A_JOB * (job % _PORT_RANGES),
    ports=max(counts),
  )
  workers = tuple(
    f"{host}:{port + local}"
    for host, count in zip(hosts, counts, strict=True)
    for local in range(count)
  )
  step = environment.get("SLURM_STEP_ID", "?")
  return Cluster(workers, rank, origin=f"Slurm step {job}.{step}")


def expand_hosts(text: str) -> tuple[str, ...]:
  """Returns the hosts of a Slurm node list in its order, as `scontrol show hostnames`.

  `node[9-10],gpu[001-002]x` is node9, node10, gpu001x, gpu002x. Not scontrol itself,
  which most containers lack.

  Raises:
    errors.UsageError: It is no node list.
  """
  hosts: list[str] = []
  for entry in re.split(r",(?![^\[]*\])", text):
    if not re.fullmatch(r"([^\s\[\],]+|\[[0-9,-]+\])+", entry):
      raise _no_node_list(text)
    parts = re.findall(r"\[([^\]]*)\]|([^\[]+)", entry)
    choices = [
      list(_expand_ranges(numbers, text)) if numbers else [plain]
      for numbers, plain in parts
    ]
    hosts += map("".join, itertools.product(*choices))
  return tuple(hosts)


def expand_counts(text: str) -> tuple[int, ...]:
  """Returns the tasks of each node: `2(x3),1` is 2, 2, 2, 1.

  Raises:
    errors.UsageError: It is no such list.
  """
  counts: list[int] = []
  for entry in text.split(","):
    found = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", entry)
    if found is None:
      raise errors.UsageError(
        f"{STEP[1]}={text!r} must be as in 2(x3),1; start the worker with srun."
      )
    counts += [int(found[1])] * int(found[2] or 1)
  return tuple(counts)


def _expand_ranges(numbers: str, text: str) -> Iterator[str]:
  """Yields the numbers of `9-10,12`, as wide as the first of each range."""
  for part in numbers.split(","):
    found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
    if found is None or int(found[2] or found[1]) < int(found[1]):
      raise _no_node_list(text)
    for value in range(int(found[1]), int(found[2] or found[1]) + 1):
      yield f"{value:0{len(found[1])}d}"


def _no_node_list(text: str) -> errors.UsageError:
  return errors.UsageError(
    f"{STEP[0]}={text!r:.120} must be as in node[9-10],gpu1; start the worker with "
    "srun."
  )


def _outside_srun(environment: Mapping[str, str]) -> Cluster:
  """Returns a single process, marked as left out if the job has several tasks."""
  tasks = environment.get("SLURM_NTASKS") or environment.get("SLURM_NNODES") or "1"
  job = environment.get("SLURM_JOB_ID")
  if not job or tasks == "1":
    return Cluster()
  return Cluster(
    left_out=f"Slurm job {job} has SLURM_NTASKS={tasks}, but srun did not start this "
    "process; put srun before the command"
  )


def _check_shape(
  environment: Mapping[str, str],
  hosts: tuple[str, ...],
  counts: tuple[int, ...],
  rank: int,
) -> None:
  """Raises UsageError unless hosts, counts and this task's place agree."""
  nodes, tasks = environment[STEP[0]], environment[STEP[1]]
  total = parse_number(environment, "SLURM_STEP_NUM_TASKS", default=sum(counts))
  if len(hosts) != len(counts) or total != sum(counts) or rank >= total:
    raise errors.UsageError(
      f"{STEP[0]}={nodes}, {STEP[1]}={tasks}, {STEP[2]}={rank} and "
      f"SLURM_STEP_NUM_TASKS={total} do not agree; a step of several job components is "
      "not supported, else set TF_CONFIG."
    )
  node = parse_number(environment, "SLURM_NODEID", default=0)
  local = parse_number(environment, "SLURM_LOCALID", default=0)
  known = "SLURM_NODEID" in environment and "SLURM_LOCALID" in environment
  if known and sum(counts[:node]) + local != rank:
    raise errors.UsageError(
      f"{STEP[2]}={rank} is task {local} of node {node}, so ranks do not run node by "
      "node; give srun --distribution=block."
    )


def _check_gpus(
  environment: Mapping[str, str], counts: tuple[int, ...], rank: int
) -> None:
  """Raises UsageError where several tasks of this host would each take all its GPUs."""
  node = bisect.bisect_right(list(itertools.accumulate(counts)), rank)
  visible = environment.get("CUDA_VISIBLE_DEVICES", "")
  on_node = parse_number(environment, "SLURM_GPUS_ON_NODE", default=0)
  if counts[node] > 1 and visible and len(visible.split(",")) == on_node:
    raise errors.UsageError(
      f"CUDA_VISIBLE_DEVICES={visible} is all GPUs of the host, for each of its "
      f"{counts[node]} tasks; give srun --gpus-per-task, or one task a host."
    )
