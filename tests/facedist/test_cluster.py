"""facedist.cluster: TF_CONFIG to a cluster, a cluster to a strategy."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

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
  ("name", "replicas"), [("one", 1), ("mirrored", 2), ("multiworker", 1)]
)
def test_each_strategy_sums_over_its_replicas(name: str, replicas: int):
  # conftest.py makes two CPU devices; multiworker has one replica on a worker's CPU.
  strategy = cluster.make_strategy(name, cluster.Cluster())
  assert strategy.num_replicas_in_sync == replicas
  assert cluster.local_replicas(strategy) == replicas

  @tf.function
  def total() -> tf.Tensor:
    def one_each() -> tf.Tensor:
      return tf.distribute.get_replica_context().all_reduce("SUM", tf.ones([]))

    return strategy.run(one_each)

  sums = strategy.experimental_local_results(total())
  np.testing.assert_array_equal(sums, [replicas] * replicas)
  cluster.barrier(strategy)


def test_strategies_on_the_cpu_print_no_warning(caplog: pytest.LogCaptureFixture):
  for name in ("one", "mirrored"):  # multiworker warns in a process that used a device
    cluster.make_strategy(name, cluster.Cluster())
  assert not [line for line in caplog.records if line.levelname == "WARNING"]


def test_a_description_names_replicas_and_place():
  strategy = cluster.make_strategy("mirrored", cluster.Cluster())
  assert cluster.describe(strategy, cluster.Cluster()) == (
    "--strategy=mirrored: 2 replicas = 1 workers x 2 CPU"
  )


def test_an_unknown_strategy_lists_the_known_ones():
  with pytest.raises(errors.UsageError, match="mirrored, multiworker, one"):
    cluster.make_strategy("horovod", cluster.Cluster())


@pytest.mark.parametrize("name", ["one", "mirrored"])
def test_a_strategy_of_one_machine_refuses_a_cluster_of_two(name: str):
  with pytest.raises(errors.UsageError, match="use --strategy=multiworker"):
    cluster.make_strategy(name, cluster.Cluster(tuple(TWO), 0))


def test_nccl_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
  with pytest.raises(errors.UsageError, match="use --communication=ring"):
    cluster.make_strategy("multiworker", cluster.Cluster(), communication="nccl")


def test_an_unknown_communication_lists_the_known_ones():
  with pytest.raises(errors.UsageError, match="auto, nccl, ring"):
    cluster.make_strategy("multiworker", cluster.Cluster(), communication="mpi")


@pytest.mark.parametrize(
  "error", [tf.errors.UnavailableError, tf.errors.DeadlineExceededError]
)
def test_a_lost_worker_is_one_line_and_a_reason_to_start_again(error: type):
  with pytest.raises(errors.PeerLostError) as caught, cluster.peer_errors():
    raise error(None, None, "Socket closed\nAdditional GRPC error information")
  assert "(Socket closed)" in str(caught.value)
  assert "\n" not in str(caught.value)
  assert caught.value.exit_code == 144


def test_other_errors_are_not_taken_for_a_lost_worker():
  with pytest.raises(tf.errors.InvalidArgumentError), cluster.peer_errors():
    raise tf.errors.InvalidArgumentError(None, None, "shapes")


WORKER = """
import os, signal, sys, time
from facedist import cluster
here = cluster.from_environment()
strategy = cluster.make_strategy("multiworker", here)
print(cluster.describe(strategy, here), flush=True)
started = time.monotonic()
time.sleep(0 if here.is_chief else 1)
cluster.barrier(strategy)
print(f"waited={time.monotonic() - started:.3f}", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(30)
"""


@pytest.mark.slow
def test_two_workers_meet_at_a_barrier_and_obey_sigterm():
  sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
  workers = [f"127.0.0.1:{taken.getsockname()[1]}" for taken in sockets]
  for taken in sockets:
    taken.close()
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", WORKER],
      env=os.environ | tf_config({"worker": workers}, index=index),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  outputs = [process.communicate(timeout=60) for process in processes]
  assert [process.returncode for process in processes] == [-signal.SIGTERM] * 2
  assert [error for _, error in outputs] == ["", ""]
  for index, role in enumerate(["the chief", f"chief at {workers[0]}"]):
    described, waited = outputs[index][0].splitlines()
    assert described == (
      "--strategy=multiworker: 2 replicas = 2 workers x 1 CPU; "
      f"this is worker {index} at {workers[index]} ({role})"
    )
    assert float(waited.removeprefix("waited=")) > 0.9
