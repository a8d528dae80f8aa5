"""facedist.cluster: TF_CONFIG to a cluster."""

import json

import pytest

from facedist import errors
from facedist.distributed import detect
from facedist.distributed.cluster import Cluster as Cluster

TWO = ["10.0.0.1:2222", "10.0.0.2:2222"]


def tf_config(jobs: dict, kind: str = "worker", index: object = 0) -> dict[str, str]:
  """Returns an environment with TF_CONFIG as a scheduler would set it."""
  task = {"type": kind, "index": index}
  return {"TF_CONFIG": json.dumps({"cluster": jobs, "task": task})}


def test_an_environment_without_a_cluster_is_a_process_by_itself():
  alone = detect.from_environment({})
  assert (alone.workers, alone.index) == ((), 0)
  assert (alone.num_workers, alone.is_chief) == (1, True)


@pytest.mark.parametrize("text", ["", "  ", "{}", '{"cluster": {}}'])
def test_an_empty_tf_config_describes_nothing(text: str):
  assert detect.from_environment({"TF_CONFIG": text}) == Cluster()


def test_workers_keep_the_order_of_tf_config():
  second = detect.from_environment(tf_config({"worker": TWO}, index=1))
  assert second.workers == tuple(TWO)
  assert (second.index, second.num_workers, second.is_chief) == (1, 2, False)


def test_an_index_written_as_text_is_read():
  assert detect.from_environment(tf_config({"worker": TWO}, index="1")).index == 1


def test_jobs_that_are_objects_by_index_are_read_in_the_order_of_the_indices():
  workers = {str(index): f"node-{index}:2222" for index in (10, 2, 1, 0)}
  workers |= {str(index): f"node-{index}:2222" for index in range(3, 10)}
  found = detect.from_environment(tf_config({"worker": workers}, index=10))
  assert found.workers == tuple(f"node-{index}:2222" for index in range(11))
  assert found.workers[found.index] == "node-10:2222"


def test_what_kubeflow_and_google_cloud_write_besides_is_accepted():
  content = {
    "cluster": {"worker": TWO, "ps": [], "evaluator": ["10.0.0.3:2222"]},
    "task": {"type": "worker", "index": 1, "trial": "1", "cloud": "x"},
    "environment": "cloud",
    "job": {},
    "rpc_layer": "grpc",
  }
  found = detect.from_environment({"TF_CONFIG": json.dumps(content)})
  assert (found.workers, found.index) == (tuple(TWO), 1)


@pytest.mark.parametrize(
  ("kind", "index", "place"), [("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2)]
)
def test_a_named_chief_is_worker_0(kind: str, index: int, place: int):
  jobs = {"worker": TWO, "chief": ["10.0.0.9:2222"]}
  found = detect.from_environment(tf_config(jobs, kind, index))
  assert found.workers == ("10.0.0.9:2222", *TWO)
  assert found.index == place
  assert found.is_chief == (kind == "chief")


WORKER_1 = {"type": "worker", "index": 1}


@pytest.mark.parametrize(
  ("content", "says"),
  [
    (
      {"sparseCluster": {"worker": {"1": "node-1:2222"}, "ps": []}, "task": WORKER_1},
      "sparseCluster.*enableDynamicWorker: false",
    ),
    ({"Cluster": {"worker": TWO}, "task": WORKER_1}, "'Cluster', which is unknown"),
    ({"clusters": {"worker": TWO}, "task": WORKER_1}, "'clusters', which is unknown"),
    ({"cluster": {"workers": TWO}, "task": WORKER_1}, "'cluster.workers', which is"),
    ({"cluster": {"Worker": TWO}, "task": WORKER_1}, "'cluster.Worker', which is"),
    ({"task": WORKER_1}, "has no cluster; write {"),
    ({"cluster": {}, "task": WORKER_1}, "worker 1, but its cluster has 0"),
    ({"cluster": {"worker": []}, "task": WORKER_1}, "worker 1, but its cluster has 0"),
    ({"cluster": {"worker": {}}, "task": WORKER_1}, "worker 1, but its cluster has 0"),
    ({"cluster": {"worker": TWO}}, "has no task; write {"),
    ({"cluster": {"worker": TWO}, "task": {}}, "has no task.type"),
    ({"cluster": {"worker": TWO}, "task": {"index": 1}}, "has no task.type"),
    ({"cluster": {"worker": TWO}, "task": {"type": "worker"}}, "has no task.index"),
    (
      {"cluster": {"worker": TWO}, "task": WORKER_1 | {"idx": 1}},
      "'task.idx', which is unknown",
    ),
    ({"cluster": {"worker": TWO}, "task": [1]}, "task that is no JSON object"),
    ({"cluster": TWO, "task": WORKER_1}, "cluster that is no JSON object"),
    ({"cluster": {"master": ["m:1"], "worker": TWO}, "task": WORKER_1}, "'master'; na"),
    (
      {"cluster": {"master": ["m:1"]}, "task": {"type": "master", "index": 0}},
      "'master'; name it chief",
    ),
    (
      {"cluster": {"chief": ["m:1", "n:1"], "worker": TWO}, "task": WORKER_1},
      "has 2 chiefs",
    ),
    (
      {"cluster": {"worker": TWO}, "task": WORKER_1, "rpc_layer": "grpc+rdma"},
      "rpc_layer 'grpc.rdma'; leave it out",
    ),
    ({"cluster": {"worker": "a:1"}, "task": WORKER_1}, "'a:1' as cluster.worker"),
    (
      {"cluster": {"worker": {"1": "a:1", "2": "b:1"}}, "task": WORKER_1},
      "the indices .'1', '2'., but no 0",
    ),
    (
      {"cluster": {"worker": {"0": "a:1", "one": "b:1"}}, "task": WORKER_1},
      "but no 1",
    ),
  ],
)
def test_a_description_that_is_not_whole_is_refused(content: dict, says: str):
  with pytest.raises(errors.UsageError, match=says) as caught:
    detect.from_environment({"TF_CONFIG": json.dumps(content)})
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "index", ["x", "1.7", "-1", "", "٣", "9" * 5000, 1.7, 1.0, -1, True, None, [1], 1e999]
)
def test_an_index_that_is_no_whole_number_is_refused(index: object):
  with pytest.raises(
    errors.UsageError, match=r"has task\.index .*write a whole number"
  ):
    detect.from_environment(tf_config({"worker": TWO}, index=index))


@pytest.mark.parametrize(
  ("environment", "says"),
  [
    ({"TF_CONFIG": "{"}, "cannot be read.*write {"),
    ({"TF_CONFIG": "[1]"}, "is no JSON object"),
    ({"TF_CONFIG": "[" * 100_000}, "cannot be read"),
    ({"TF_CONFIG": '{"cluster": {}, "cluster": {}}'}, "contains a name twice"),
    (tf_config({"worker": TWO}, "evaluator"), r"facedist\.evaluate"),
    (tf_config({"worker": TWO, "ps": ["a:1"]}, "ps"), "task type 'ps'"),
    (tf_config({"worker": TWO}, index=2), "worker 2, but its cluster has 2"),
    (tf_config({"worker": TWO}, "chief"), "chief 0, but its cluster has 0"),
    (tf_config({"worker": ["a", "b:1"]}), "address 'a': it has no port"),
    (tf_config({"worker": [1, 2]}), "address 1: it is no text"),
    (tf_config({"worker": ["a:1", "A:1"]}), "twice"),
    (tf_config({"worker": ["a:1"], "chief": ["a:1"]}), "twice"),
  ],
)
def test_a_wrong_tf_config_is_one_line_for_the_user(environment, says: str):
  with pytest.raises(errors.UsageError, match=says) as caught:
    detect.from_environment(environment)
  assert "\n" not in str(caught.value)
