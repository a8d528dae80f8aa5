"""Reads the cluster of a Kubernetes Indexed Job: one worker in each pod.

Kubernetes sets JOB_COMPLETION_INDEX; the manifest gives the others (see
launch/kubernetes). A pod of an Indexed Job has the host name `<job>-<index>` in the
domain of the headless service. The same holds for a job of a JobSet, whose name is
`<set>-<replicated job>-0`.
"""

from collections.abc import Mapping

from facedist import errors
from facedist.distributed.cluster import Cluster, base_port, parse_number

INDEX = "JOB_COMPLETION_INDEX"
WORKERS = "FACEDIST_WORKERS"
JOB = "FACEDIST_JOB"
SERVICE = "FACEDIST_SERVICE"
DEFAULT_PORT = 2222
_MAX_WORKERS = 100_000  # pods of an Indexed Job


def read(environment: Mapping[str, str]) -> Cluster:
  """Returns the cluster of the Indexed Job that this process's pod belongs to.

  A pod without FACEDIST_WORKERS, FACEDIST_JOB and FACEDIST_SERVICE, such as a sweep's
  or the evaluator's, is a single process.

  Raises:
    errors.UsageError: Some of the variables are missing, or wrong.
  """
  needed = (WORKERS, JOB, SERVICE)
  if not any(environment.get(name) for name in needed):
    return Cluster()
  missing = [name for name in (*needed, INDEX) if not environment.get(name)]
  if missing:
    raise errors.UsageError(
      f"{', '.join(needed)} and {INDEX} belong together, but {missing[0]} is not set; "
      "take the worker's environment from launch/kubernetes, or unset them all."
    )
  workers, index = parse_number(environment, WORKERS), parse_number(environment, INDEX)
  if index >= workers:
    raise errors.UsageError(
      f"{INDEX}={index} must be below {WORKERS}={workers}; make that the job's "
      "completions."
    )
  if workers > _MAX_WORKERS:
    raise errors.UsageError(
      f"{WORKERS}={workers} must be at most {_MAX_WORKERS}; make it the job's "
      "completions."
    )
  port = base_port(environment, default=DEFAULT_PORT)
  job, service = environment[JOB], environment[SERVICE]
  return Cluster(
    tuple(f"{job}-{place}.{service}:{port}" for place in range(workers)),
    index,
    origin=f"Kubernetes job {job}",
  )
