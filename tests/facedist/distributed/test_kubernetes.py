"""facedist.cluster: an Indexed Job's variables to a cluster."""

import pytest

from facedist import errors
from facedist.distributed import detect
from facedist.distributed.cluster import Cluster as Cluster


def pod(**changes: str) -> dict[str, str]:
  """Returns what the pod of worker 1 of a JobSet has, with changes."""
  variables = {
    "JOB_COMPLETION_INDEX": "1",
    "FACEDIST_WORKERS": "2",
    "FACEDIST_JOB": "facedist-workers-0",
    "FACEDIST_SERVICE": "facedist",
  } | changes
  return {name: value for name, value in variables.items() if value}


def test_a_jobset_s_workers_have_the_names_that_its_service_gives_them():
  found = detect.from_environment(pod())
  assert found.workers == (
    "facedist-workers-0-0.facedist:2222",
    "facedist-workers-0-1.facedist:2222",
  )
  assert found.index == 1
  assert found.origin == "Kubernetes job facedist-workers-0"


def test_an_indexed_job_s_pods_are_named_by_index_and_the_port_can_be_chosen():
  found = detect.from_environment(
    pod(FACEDIST_JOB="train", FACEDIST_SERVICE="peers", FACEDIST_PORT="5000")
  )
  assert found.workers == ("train-0.peers:5000", "train-1.peers:5000")


def test_a_pod_without_the_cluster_s_variables_is_by_itself():
  environment = {"JOB_COMPLETION_INDEX": "3", "FACEDIST_PORT": "2222"}
  assert detect.from_environment(environment) == Cluster()


def test_a_job_of_one_worker_is_a_cluster_of_one():
  found = detect.from_environment(pod(FACEDIST_WORKERS="1", JOB_COMPLETION_INDEX="0"))
  assert found.workers == ("facedist-workers-0-0.facedist:2222",)
  assert (found.num_workers, found.is_chief) == (1, True)


def test_tf_config_wins_over_kubernetes():
  config = (
    '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}'
  )
  found = detect.from_environment(pod(TF_CONFIG=config, FACEDIST_WORKERS="x"))
  assert found.workers == ("a:1", "b:1")


SLURM = {
  "SLURM_JOB_ID": "17",
  "SLURM_STEP_NODELIST": "node[9-10]",
  "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
  "SLURM_PROCID": "0",
}


@pytest.mark.parametrize(
  ("environment", "says"),
  [
    (pod(FACEDIST_WORKERS=""), "FACEDIST_WORKERS is not set"),
    (pod(FACEDIST_JOB=""), "FACEDIST_JOB is not set"),
    (pod(FACEDIST_SERVICE=""), "FACEDIST_SERVICE is not set"),
    (pod(JOB_COMPLETION_INDEX=""), "JOB_COMPLETION_INDEX is not set"),
    (pod(JOB_COMPLETION_INDEX="2"), "=2 must be below FACEDIST_WORKERS=2"),
    (pod(JOB_COMPLETION_INDEX="1e999"), "INDEX='1e999' must be a whole number"),
    (pod(FACEDIST_WORKERS="9" * 5000), "must be a whole number"),
    (pod(FACEDIST_WORKERS="100001"), "=100001 must be at most 100000"),
    (pod(FACEDIST_JOB="a" * 62), "63 between two dots, so the job needs a shorter"),
    (pod(FACEDIST_JOB="a..b"), "Kubernetes job a..b has the worker address"),
    (pod(FACEDIST_WORKERS="two"), "FACEDIST_WORKERS='two' must be a whole number"),
    (pod(FACEDIST_PORT="70000"), "FACEDIST_PORT=70000 must be 1 to 65535"),
    (pod() | SLURM, "both describe a cluster; unset FACEDIST_WORKERS or set TF_CONFIG"),
  ],
)
def test_partial_or_ambiguous_variables_are_one_line_for_the_user(
  environment, says: str
):
  with pytest.raises(errors.UsageError, match=says) as caught:
    detect.from_environment(environment)
  assert "\n" not in str(caught.value)
