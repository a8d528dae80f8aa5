"""facedist.cluster: a Slurm step's variables to a cluster."""

import pytest

from facedist import errors
from facedist.distributed import detect, slurm
from facedist.distributed.cluster import Cluster as Cluster


def step(**changes: str) -> dict[str, str]:
  """Returns what srun gives task 1 of a step on node9 and node10, with changes."""
  variables = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NODELIST": "node[9-10]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "FACEDIST_PORT": "4000",
  } | changes
  return {name: value for name, value in variables.items() if value}


def crowded(**changes: str) -> dict[str, str]:
  """Returns what srun gives task 2 of two on node9 and one on node10."""
  return step(
    SLURM_STEP_TASKS_PER_NODE="2,1",
    SLURM_STEP_NUM_TASKS="3",
    SLURM_PROCID="2",
    **changes,
  )


@pytest.mark.parametrize(
  ("text", "hosts"),
  [
    ("node1", ["node1"]),
    ("node[9-10]", ["node9", "node10"]),
    ("node[10,9]", ["node10", "node9"]),
    ("gpu[008-010,012]", ["gpu008", "gpu009", "gpu010", "gpu012"]),
    ("a[1-2]x,login,b3", ["a1x", "a2x", "login", "b3"]),
    ("r[0-1]n[1-2]", ["r0n1", "r0n2", "r1n1", "r1n2"]),
    ("gpu-a.example.org,[1-2]b", ["gpu-a.example.org", "1b", "2b"]),
  ],
)
def test_node_lists_expand_in_their_own_order(text: str, hosts: list[str]):
  assert slurm.expand_hosts(text) == tuple(hosts)


@pytest.mark.parametrize(
  "text", ["node[1", "node]1[", "node[]", "node[a-b]", "node[3-1]", "a,,b", "a b", "a,"]
)
def test_a_wrong_node_list_is_refused(text: str):
  with pytest.raises(errors.UsageError, match="SLURM_STEP_NODELIST="):
    slurm.expand_hosts(text)


def test_counts_of_tasks_expand():
  assert slurm.expand_counts("2(x3),1") == (2, 2, 2, 1)
  assert slurm.expand_counts("4") == (4,)
  for text in ("2(x3", "2x3", "", "2,,1", "-1"):
    with pytest.raises(errors.UsageError, match="SLURM_STEP_TASKS_PER_NODE="):
      slurm.expand_counts(text)


def test_ranks_follow_the_node_list_and_not_the_alphabet():
  found = detect.from_environment(step())
  assert found.workers == ("node9:4000", "node10:4000")
  assert (found.index, found.is_chief) == (1, False)
  assert found.origin == "Slurm step 17.0"


def test_tasks_of_one_host_have_ports_in_a_row():
  found = detect.from_environment(crowded())
  assert found.workers == ("node9:4000", "node9:4001", "node10:4000")
  assert found.index == 2


def test_jobs_on_one_host_have_ports_of_their_own_below_those_linux_gives_out():
  ports = set()
  for job in range(700, 700 + 768):
    found = detect.from_environment(crowded(FACEDIST_PORT="", SLURM_JOB_ID=str(job)))
    taken = {int(worker.split(":")[1]) for worker in found.workers}
    assert not taken & ports
    ports |= taken
  assert min(ports) >= 1024
  assert max(ports) < 32768  # where Linux's own range starts


def test_a_step_of_one_task_is_a_cluster_of_one():
  alone = step(
    SLURM_STEP_NODELIST="node9",
    SLURM_STEP_TASKS_PER_NODE="1",
    SLURM_STEP_NUM_TASKS="1",
    SLURM_PROCID="0",
    SLURM_NODEID="0",
  )
  found = detect.from_environment(alone)
  assert found.workers == ("node9:4000",)
  assert (found.index, found.num_workers) == (0, 1)


@pytest.mark.parametrize("tasks", ["1", ""])
def test_a_job_of_one_task_outside_srun_is_a_process_by_itself(tasks: str):
  batch = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": tasks}
  assert detect.from_environment(batch) == Cluster()


@pytest.mark.parametrize("variable", ["SLURM_NTASKS", "SLURM_NNODES"])
def test_the_batch_script_of_several_tasks_is_no_worker_and_says_why(variable: str):
  batch = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", variable: "2"}
  found = detect.from_environment(batch)
  assert found.workers == ()
  assert found.left_out == (
    "Slurm job 17 has SLURM_NTASKS=2, but srun did not start this process; put srun "
    "before the command"
  )


def test_tf_config_wins_over_slurm():
  config = (
    '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}'
  )
  found = detect.from_environment(step(TF_CONFIG=config, SLURM_PROCID="x"))
  assert found.workers == ("a:1", "b:1")


@pytest.mark.parametrize(
  ("environment", "says"),
  [
    (step(SLURM_PROCID=""), "SLURM_PROCID is not; start the worker with srun"),
    (step(SLURM_STEP_TASKS_PER_NODE=""), "TASKS_PER_NODE is not"),
    (step(SLURM_JOB_ID=""), "SLURM_JOB_ID is not"),
    (step(SLURM_PROCID="one"), "SLURM_PROCID='one' must be a whole number"),
    (step(SLURM_PROCID="2"), "SLURM_PROCID=2 and SLURM_STEP_NUM_TASKS=2 do not agree"),
    (step(SLURM_STEP_TASKS_PER_NODE="2"), "do not agree"),
    (step(SLURM_STEP_NUM_TASKS="4"), "several job components"),
    (crowded(SLURM_NODEID="0", SLURM_LOCALID="1"), "give srun --distribution=block"),
    (step(FACEDIST_PORT="0"), "FACEDIST_PORT=0 must be 1 to 65535"),
    (crowded(FACEDIST_PORT="65535"), "must be 1 to 65534, so that the 2 workers"),
    (step(FACEDIST_PORT="http"), "FACEDIST_PORT='http' must be a whole number"),
  ],
)
def test_partial_or_contradicting_variables_are_one_line_for_the_user(
  environment, says: str
):
  with pytest.raises(errors.UsageError, match=says) as caught:
    detect.from_environment(environment)
  assert "\n" not in str(caught.value)


ALL_GPUS = {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"}
FIRST = {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}


def test_tasks_of_one_host_that_each_see_all_its_gpus_are_refused():
  with pytest.raises(errors.UsageError, match="give srun --gpus-per-task"):
    detect.from_environment(crowded(**ALL_GPUS) | FIRST)


@pytest.mark.parametrize(
  "environment",
  [
    step(**ALL_GPUS),
    crowded(**ALL_GPUS),  # this one is alone on node10
    crowded(CUDA_VISIBLE_DEVICES="1", SLURM_GPUS_ON_NODE="2") | FIRST,
    crowded(SLURM_GPUS_ON_NODE="2") | FIRST,
  ],
)
def test_tasks_with_gpus_of_their_own_are_workers(environment):
  assert detect.from_environment(environment).workers
