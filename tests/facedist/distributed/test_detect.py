"""The cluster that TF_CONFIG, Slurm or Kubernetes describes, or one on this machine."""

import json
import secrets
import socket

import pytest

from facedist import errors
from facedist.distributed import detect, slurm
from facedist.distributed.cluster import Cluster

Environment = dict[str, str]

TWO = ("10.0.0.1:2222", "10.0.0.2:2222")
NODES = ("node9:4000", "node10:4000")
PODS = ("facedist-workers-0-0.facedist:2222", "facedist-workers-0-1.facedist:2222")


def tf_config(jobs: object, kind: str = "worker", index: object = 0) -> Environment:
  """Returns an environment with TF_CONFIG as a scheduler would set it."""
  return content(cluster=jobs, task={"type": kind, "index": index})


def content(**parts: object) -> Environment:
  return {"TF_CONFIG": json.dumps(parts)}


def step(**changes: str) -> Environment:
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


def crowded(**changes: str) -> Environment:
  """Returns what srun gives task 2 of two on node9 and one on node10."""
  own = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2"}
  return step(**{"SLURM_STEP_TASKS_PER_NODE": "2,1"} | own | changes)


def batch_script(**changes: str) -> Environment:
  return {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0"} | changes


def pod(**changes: str) -> Environment:
  """Returns what the pod of worker 1 of a JobSet has, with changes."""
  variables = {
    "JOB_COMPLETION_INDEX": "1",
    "FACEDIST_WORKERS": "2",
    "FACEDIST_JOB": "facedist-workers-0",
    "FACEDIST_SERVICE": "facedist",
  } | changes
  return {name: value for name, value in variables.items() if value}


@pytest.mark.parametrize(
  "environment",
  [
    {},
    *({"TF_CONFIG": text} for text in ("", "  ", "{}", '{"cluster": {}}')),
    batch_script(SLURM_NTASKS="1"),
    batch_script(),
    {"JOB_COMPLETION_INDEX": "3", "FACEDIST_PORT": "2222"},
  ],
)
def test_an_environment_without_a_cluster_is_a_process_by_itself(environment):
  assert detect.from_environment(environment) == Cluster()


ELEVEN = tuple(f"node-{index}:2222" for index in range(11))
BY_INDEX = {str(index): ELEVEN[index] for index in (10, 2, 1, 0, *range(3, 10))}
WITH_CHIEF = {"worker": TWO, "chief": ["10.0.0.9:2222"]}
ALONE = {"SLURM_STEP_NODELIST": "node9", "SLURM_STEP_TASKS_PER_NODE": "1"}
ALONE |= {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
# what Kubeflow and Google Cloud write besides
KUBEFLOW = content(
  cluster={"worker": TWO, "ps": [], "evaluator": ["10.0.0.3:2222"]},
  task={"type": "worker", "index": 1, "trial": "1", "cloud": "x"},
  environment="cloud",
  job={},
  rpc_layer="grpc",
)


@pytest.mark.parametrize(
  ("environment", "workers", "index", "origin"),
  [
    (tf_config({"worker": TWO}, index=1), TWO, 1, "TF_CONFIG"),
    (tf_config({"worker": TWO}, index="1"), TWO, 1, "TF_CONFIG"),
    (tf_config({"worker": BY_INDEX}, index=10), ELEVEN, 10, "TF_CONFIG"),
    (KUBEFLOW, TWO, 1, "TF_CONFIG"),
    *(
      (tf_config(WITH_CHIEF, *task), ("10.0.0.9:2222", *TWO), place, "TF_CONFIG")
      for place, task in enumerate((("chief", 0), ("worker", 0), ("worker", 1)))
    ),
    # ranks follow the node list and not the alphabet
    (step(), NODES, 1, "Slurm step 17.0"),
    (crowded(), ("node9:4000", "node9:4001", NODES[1]), 2, "Slurm step 17.0"),
    (step(**ALONE), NODES[:1], 0, "Slurm step 17.0"),
    (pod(), PODS, 1, "Kubernetes job facedist-workers-0"),
    (
      pod(FACEDIST_JOB="train", FACEDIST_SERVICE="peers", FACEDIST_PORT="5000"),
      ("train-0.peers:5000", "train-1.peers:5000"),
      1,
      "Kubernetes job train",
    ),
    (
      pod(FACEDIST_WORKERS="1", JOB_COMPLETION_INDEX="0"),
      PODS[:1],
      0,
      "Kubernetes job facedist-workers-0",
    ),
    # TF_CONFIG wins, whatever the others are
    *(
      (other | tf_config({"worker": TWO}), TWO, 0, "TF_CONFIG")
      for other in (step(SLURM_PROCID="x"), pod(FACEDIST_WORKERS="x"))
    ),
  ],
)
def test_workers_are_read_in_the_order_of_their_ranks(
  environment, workers: tuple[str, ...], index: int, origin: str
):
  found = detect.from_environment(environment)
  assert found == Cluster(workers, index, origin)
  assert (found.num_workers, found.is_chief) == (len(workers), index == 0)


@pytest.mark.parametrize("variable", ["SLURM_NTASKS", "SLURM_NNODES"])
def test_the_batch_script_of_several_tasks_is_no_worker_and_says_why(variable: str):
  found = detect.from_environment(batch_script(**{variable: "2"}))
  assert found.workers == ()
  assert found.left_out == (
    "Slurm job 17 has SLURM_NTASKS=2, but srun did not start this process; put srun "
    "before the command"
  )


ALL_GPUS = {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"}
FIRST = {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
  "environment",
  [
    step(**ALL_GPUS),
    crowded(**ALL_GPUS),  # this one is alone on node10
    crowded(CUDA_VISIBLE_DEVICES="1", SLURM_GPUS_ON_NODE="2", **FIRST),
    crowded(SLURM_GPUS_ON_NODE="2", **FIRST),
  ],
)
def test_tasks_with_gpus_of_their_own_are_workers(environment):
  assert detect.from_environment(environment).workers


WORKER_1 = {"type": "worker", "index": 1}


@pytest.mark.parametrize(
  ("environment", "says"),
  [
    # TF_CONFIG
    ({"TF_CONFIG": "{"}, "cannot be read.*write {"),
    ({"TF_CONFIG": "[1]"}, "is no JSON object"),
    ({"TF_CONFIG": "[" * 100_000}, "cannot be read"),
    ({"TF_CONFIG": '{"cluster": {}, "cluster": {}}'}, "contains a name twice"),
    (content(Cluster={"worker": TWO}, task=WORKER_1), "'Cluster', which is unknown"),
    (
      content(sparseCluster={"worker": {"1": "node-1:2222"}}, task=WORKER_1),
      "sparseCluster.*enableDynamicWorker: false",
    ),
    (content(task=WORKER_1), "has no cluster; write {"),
    (content(cluster=TWO, task=WORKER_1), "cluster that is no JSON object"),
    (content(cluster={"worker": TWO}), "has no task; write {"),
    (content(cluster={"worker": TWO}, task=[1]), "task that is no JSON object"),
    (content(cluster={"worker": TWO}, task={"index": 1}), "has no task.type"),
    (content(cluster={"worker": TWO}, task={"type": "worker"}), "has no task.index"),
    (
      content(cluster={"worker": TWO}, task=WORKER_1 | {"idx": 1}),
      "'task.idx', which is unknown",
    ),
    (
      content(cluster={"worker": TWO}, task=WORKER_1, rpc_layer="grpc+rdma"),
      "rpc_layer 'grpc.rdma'; leave it out",
    ),
    (tf_config({"workers": TWO}), "'cluster.workers', which is unknown"),
    (tf_config({"master": ["m:1"], "worker": TWO}), "job 'master'; name it chief"),
    (tf_config({"master": ["m:1"]}, "master"), "task 'master'; name it chief"),
    (tf_config({"chief": ["m:1", "n:1"], "worker": TWO}), "has 2 chiefs"),
    (tf_config({"worker": TWO}, "evaluator"), r"facedist\.evaluate"),
    (tf_config({"worker": TWO, "ps": ["a:1"]}, "ps"), "task type 'ps'"),
    (tf_config({}), "worker 0, but its cluster has 0"),
    (tf_config({"worker": []}), "worker 0, but its cluster has 0"),
    (tf_config({"worker": TWO}, index=2), "worker 2, but its cluster has 2"),
    (tf_config({"worker": TWO}, "chief"), "chief 0, but its cluster has 0"),
    (tf_config({"worker": "a:1"}), "'a:1' as cluster.worker"),
    (tf_config({"worker": {"1": "a:1", "2": "b:1"}}), "indices .'1', '2'., but no 0"),
    (tf_config({"worker": {"0": "a:1", "one": "b:1"}}), "but no 1"),
    (tf_config({"worker": [1, 2]}), "address 1: it is no text"),
    (tf_config({"worker": ["a:1", "A:1"]}), "twice"),
    (tf_config({"worker": ["a:1"], "chief": ["a:1"]}), "twice"),
    *(
      (tf_config({"worker": TWO}, index=index), r"has task\.index .*a whole number")
      for index in ("x", "1.7", "-1", "", "٣", "9" * 5000, 1.0, -1, True, None, 1e999)
    ),
    # Slurm
    (step(SLURM_PROCID=""), "SLURM_PROCID is not; start the worker with srun"),
    (step(SLURM_STEP_TASKS_PER_NODE=""), "TASKS_PER_NODE is not"),
    (step(SLURM_JOB_ID=""), "SLURM_JOB_ID is not"),
    (step(SLURM_PROCID="one"), "SLURM_PROCID='one' must be a whole number"),
    (step(SLURM_PROCID="2"), "SLURM_PROCID=2 and SLURM_STEP_NUM_TASKS=2 do not agree"),
    (step(SLURM_STEP_TASKS_PER_NODE="2"), "do not agree"),
    (step(SLURM_STEP_NUM_TASKS="4"), "several job components"),
    (crowded(SLURM_NODEID="0", SLURM_LOCALID="1"), "give srun --distribution=block"),
    (crowded(**ALL_GPUS, **FIRST), "give srun --gpus-per-task"),
    (step(FACEDIST_PORT="0"), "FACEDIST_PORT=0 must be 1 to 65535"),
    (crowded(FACEDIST_PORT="65535"), "must be 1 to 65534, so that the 2 workers"),
    (step(FACEDIST_PORT="http"), "FACEDIST_PORT='http' must be a whole number"),
    *(
      (step(SLURM_STEP_NODELIST=text), "SLURM_STEP_NODELIST=.* as in node.9-10.")
      for text in ("n[1", "n]1[", "n[]", "n[a-b]", "n[3-1]", "a,,b", "a b", "a,")
    ),
    *(
      (step(SLURM_STEP_TASKS_PER_NODE=text), "TASKS_PER_NODE=.* as in 2.x3.,1")
      for text in ("2(x3", "2x3", "2,,1", "-1")
    ),
    # Kubernetes
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
    (pod(FACEDIST_PORT="70000"), "FACEDIST_PORT=70000 must be 1 to 65535"),
    (
      pod() | step(FACEDIST_PORT=""),
      "both describe a cluster; unset FACEDIST_WORKERS or set TF_CONFIG",
    ),
  ],
)
def test_a_wrong_environment_is_one_line_for_the_user(environment, says: str):
  with pytest.raises(errors.UsageError, match=says) as caught:
    detect.from_environment(environment)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("text", "hosts"),
  [
    ("node1", ["node1"]),
    ("node[10,9]", ["node10", "node9"]),
    ("gpu[008-010,012]", ["gpu008", "gpu009", "gpu010", "gpu012"]),
    ("a[1-2]x,login,b3", ["a1x", "a2x", "login", "b3"]),
    ("r[0-1]n[1-2]", ["r0n1", "r0n2", "r1n1", "r1n2"]),
    ("gpu-a.example.org,[1-2]b", ["gpu-a.example.org", "1b", "2b"]),
  ],
)
def test_slurm_s_node_lists_expand_in_their_own_order(text: str, hosts: list[str]):
  assert slurm.expand_hosts(text) == tuple(hosts)


def test_jobs_on_one_host_have_ports_of_their_own_below_those_linux_gives_out():
  ports = set()
  for job in range(700, 700 + 768):
    found = detect.from_environment(crowded(FACEDIST_PORT="", SLURM_JOB_ID=str(job)))
    taken = {int(worker.split(":")[1]) for worker in found.workers}
    assert not taken & ports
    ports |= taken
  assert min(ports) >= 1024
  assert max(ports) < 32768  # where Linux's own range starts


def test_free_addresses_are_those_whose_two_ports_are_both_free(
  monkeypatch: pytest.MonkeyPatch,
):
  free = [int(each.split(":")[1]) for each in detect.free_addresses(2)]
  assert max(free) < 32768  # or an outgoing connection could take them meanwhile
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as heartbeats:
    heartbeats.bind(("127.0.0.1", 0))
    drawn = [heartbeats.getsockname()[1], free[0], free[0], free[1]]
    monkeypatch.setattr(secrets, "randbelow", lambda _: drawn.pop(0) - 10_000)
    addresses = detect.free_addresses(2)
  assert not drawn
  assert len(set(addresses)) == 2
  for address in addresses:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
      again.bind(("127.0.0.1", int(address.rpartition(":")[2])))
