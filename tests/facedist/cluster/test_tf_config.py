"""facedist.cluster: TF_CONFIG to a cluster."""

import json

import pytest

from facedist import cluster, errors

TWO = ["10.0.0.1:2222", "10.0.0.2:2222"]


def tf_config(jobs: dict, kind: str = "worker", index: object = 0) -> dict[str, str]:
  """Returns an environment with TF_CONFIG as a scheduler would set it."""
  task = {"type": kind, "index": index}
  return {"TF_CONFIG": json.dumps({"cluster": jobs, "task": task})}


def test_an_environment_without_a_cluster_is_a_process_by_itself():
  alone = cluster.from_environment({})
  assert (alone.workers, alone.index) == ((), 0)
  assert (alone.num_workers, alone.is_chief) == (1, True)


@pytest.mark.parametrize("text", ["", "{}", '{"cluster": {}}'])
def test_an_empty_tf_config_is_a_process_by_itself(text: str):
  assert cluster.from_environment({"TF_CONFIG": text}) == cluster.Cluster()


def test_workers_keep_the_order_of_tf_config():
  second = cluster.from_environment(tf_config({"worker": TWO}, index=1))
  assert second.workers == tuple(TWO)
  assert (second.index, second.num_workers, second.is_chief) == (1, 2, False)


def test_an_index_written_as_text_is_read():
  assert cluster.from_environment(tf_config({"worker": TWO}, index="1")).index == 1


@pytest.mark.parametrize(
  ("kind", "index", "place"), [("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2)]
)
def test_a_named_chief_is_worker_0(kind: str, index: int, place: int):
  jobs = {"worker": TWO, "chief": ["10.0.0.9:2222"]}
  found = cluster.from_environment(tf_config(jobs, kind, index))
  assert found.workers == ("10.0.0.9:2222", *TWO)
  assert found.index == place
  assert found.is_chief == (kind == "chief")


@pytest.mark.parametrize(
  ("environment", "says"),
  [
    ({"TF_CONFIG": "{"}, "cannot be read.*write {"),
    ({"TF_CONFIG": "[1]"}, "cannot be read"),
    ({"TF_CONFIG": '{"cluster": 3}'}, "cannot be read"),
    (tf_config({"worker": TWO}, index="x"), "cannot be read"),
    (tf_config({"worker": TWO}, "evaluator"), r"facedist\.evaluate"),
    (tf_config({"worker": TWO, "ps": ["a:1"]}, "ps"), "task type 'ps'"),
    (tf_config({"worker": TWO}, index=2), "worker 2, but its cluster has 2"),
    (tf_config({"worker": TWO}, index=-1), "worker -1, but its cluster has 2"),
    (tf_config({"worker": TWO}, "chief"), "chief 0, but its cluster has 0"),
    (tf_config({"worker": ["a", "b:1"]}), "address 'a'; write host:port"),
    (tf_config({"worker": [1, 2]}), "address 1; write host:port"),
    (tf_config({"worker": ["a:1", "a:1"]}), "twice"),
  ],
)
def test_a_wrong_tf_config_is_one_line_for_the_user(environment, says: str):
  with pytest.raises(errors.UsageError, match=says) as caught:
    cluster.from_environment(environment)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("address", "parts"),
  [
    ("10.0.0.1:2222", ("10.0.0.1", 2222)),
    ("node-9.faces:1", ("node-9.faces", 1)),
    ("[fe80::1]:2222", ("fe80::1", 2222)),
  ],
)
def test_an_address_is_split_at_its_port(address: str, parts: tuple[str, int]):
  assert cluster.split_address(address) == parts
