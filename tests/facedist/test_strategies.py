"""The strategy of a cluster, and how TensorFlow forms its own cluster."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import tensorflow as tf

from facedist import errors
from facedist.distributed import collectives, detect, strategies
from facedist.distributed.cluster import Cluster as Cluster
from tests.processes import without_notices

ONE = Cluster(("10.0.0.1:2222",))
TWO = ("10.0.0.1:2222", "10.0.0.2:2222")


@pytest.mark.parametrize(
  ("name", "replicas"), [("one", 1), ("mirrored", 2), ("multiworker", 1)]
)
def test_each_strategy_sums_over_its_replicas(name: str, replicas: int):
  # conftest.py makes two CPU devices; multiworker has one replica on a worker's CPU.
  strategy = strategies.make_strategy(name, ONE)
  assert strategy.num_replicas_in_sync == replicas
  assert strategies.local_replicas(strategy) == replicas

  @tf.function
  def total() -> tf.Tensor:
    def one_each() -> tf.Tensor:
      return tf.distribute.get_replica_context().all_reduce("SUM", tf.ones([]))

    return strategy.run(one_each)

  sums = strategy.experimental_local_results(total())
  np.testing.assert_array_equal(sums, [replicas] * replicas)
  collectives.barrier(strategy)
  np.testing.assert_array_equal(
    collectives.gather_from_workers(strategy, [3, 4]), [[3, 4]]
  )
  assert collectives.broadcast_from_chief(strategy, [5, 7], is_chief=True) == [5, 7]
  assert collectives.broadcast_from_chief(strategy, [5, 7], is_chief=False) == [0, 0]
  places = strategies.places(strategy)
  assert list(places) == list(range(replicas))
  for number, device in places.items():
    assert device.endswith(f"CPU:{number}")


@pytest.mark.parametrize(
  ("communication", "expected"), [("auto", "RING"), ("ring", "RING"), ("nccl", "NCCL")]
)
def test_collectives_on_a_cpu_are_a_ring_unless_told(communication: str, expected: str):
  assert strategies.choose_collectives(communication) == expected


def test_strategies_on_the_cpu_print_no_warning(caplog: pytest.LogCaptureFixture):
  for name in ("one", "mirrored"):  # multiworker warns in a process that used a device
    strategies.make_strategy(name, Cluster())
  assert not [line for line in caplog.records if line.levelname == "WARNING"]


@pytest.mark.parametrize(
  ("communication", "megabytes", "expected"),
  [("ring", None, 4_000_000), ("nccl", None, 25_000_000), ("nccl", 0.5, 500_000)],
)
def test_gradients_are_reduced_in_packs(
  communication: str, megabytes: float | None, expected: int
):
  options = strategies.communication_options(communication, megabytes)
  assert options.bytes_per_pack == expected
  assert options.implementation.name == communication.upper()


@pytest.mark.parametrize(
  ("name", "cluster", "communication", "says"),
  [
    ("horovod", Cluster(), "auto", "choose one of mirrored, multiworker, one"),
    ("multiworker", ONE, "mpi", "choose one of auto, nccl, ring"),
    ("one", Cluster(TWO, 0), "auto", "use --strategy=multiworker"),
    ("mirrored", Cluster(TWO, 0), "auto", "use --strategy=multiworker"),
    ("multiworker", Cluster(left_out="srun did not; use srun"), "auto", "srun did not"),
  ],
)
def test_a_strategy_that_cannot_be_is_refused(
  name: str, cluster: Cluster, communication: str, says: str
):
  with pytest.raises(errors.UsageError, match=says):
    strategies.make_strategy(name, cluster, communication=communication)


def test_multiworker_without_a_description_names_the_three_ways_and_mirrored():
  with pytest.raises(errors.UsageError) as caught:
    strategies.make_strategy("multiworker", Cluster())
  for way in ("TF_CONFIG", "Slurm step", "Kubernetes job", "--strategy=mirrored"):
    assert way in str(caught.value)
  assert "\n" not in str(caught.value)


def test_nccl_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
  with pytest.raises(errors.UsageError, match="use --communication=ring"):
    strategies.make_strategy("multiworker", ONE, communication="nccl")


@pytest.mark.parametrize(
  ("before", "after"), [({}, ""), ({"no_grpc_proxy": "a,b"}, "a,b,")]
)
@pytest.mark.parametrize("proxy", ["grpc_proxy", "https_proxy", "http_proxy"])
def test_workers_bypass_a_proxy_and_nothing_else_does(
  proxy: str, before: dict[str, str], after: str
):
  given = {proxy: "http://proxy:3128", "no_proxy": "c"} | before
  environment = dict(given)
  workers = ("node-1:2222", "node-1:2223", "[fe80::1]:2222")
  strategies.bypass_proxies(Cluster(workers), environment)
  assert environment == given | {"no_grpc_proxy": f"{after}node-1,fe80::1"}


def test_without_a_proxy_no_variable_is_set():
  environment = {"no_proxy": "c", "http_proxy": ""}
  strategies.bypass_proxies(Cluster(TWO), environment)
  assert environment == {"no_proxy": "c", "http_proxy": ""}


WORKER = """
import os, signal, sys, time
from facedist.distributed import detect
from facedist.distributed import collectives, strategies
here = detect.from_environment()
strategy = strategies.make_strategy("multiworker", here)
print(strategies.describe_strategy(strategy, here), flush=True)
started = time.monotonic()
time.sleep(0 if here.is_chief else 1)
collectives.barrier(strategy)
print(f"waited={time.monotonic() - started:.3f}", flush=True)
told = collectives.gather_from_workers(strategy, [here.index + 5, 2**40])
print("told=", told.tolist(), sep="", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(30)
"""
FORMING = """
from facedist import errors
from facedist.distributed import detect, strategies
try:
  strategies.make_strategy("multiworker", detect.from_environment())
except errors.FacedistError as error:
  print(int(error.exit_code), error)
"""


def start(
  program: str, workers: Sequence[str], index: int, **variables: str
) -> subprocess.Popen:
  """Starts a program as one of the workers."""
  task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
  return subprocess.Popen(
    [sys.executable, "-c", program],
    env=os.environ | variables | {"TF_CONFIG": json.dumps(task)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_two_workers_reach_a_barrier_past_any_proxy_and_end_on_sigterm():
  nobody = "http://127.0.0.1:9"
  workers = detect.free_addresses(2)
  processes = [
    start(WORKER, workers, index, http_proxy=nobody, https_proxy=nobody)
    for index in range(2)
  ]
  outputs = [process.communicate(timeout=60) for process in processes]
  assert [process.returncode for process in processes] == [-signal.SIGTERM] * 2
  assert [without_notices(error) for _, error in outputs] == ["", ""]
  for index, role in enumerate(["the chief", f"chief at {workers[0]}"]):
    described, waited, told = outputs[index][0].splitlines()
    assert described == (
      "--strategy=multiworker: 2 replicas = 2 workers x 1 CPU; "
      f"this is worker {index} at {workers[index]} ({role})"
    )
    assert float(waited.removeprefix("waited=")) > 0.9
    assert told == "told=[[5, 1099511627776], [6, 1099511627776]]"


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line_with_the_address_and_a_restart():
  (own,) = detect.free_addresses(1)
  with socket.create_server(("127.0.0.1", int(own.rpartition(":")[2]))):
    output, _ = start(FORMING, [own, "127.0.0.1:1"], 0).communicate(timeout=120)
  (line,) = output.splitlines()
  assert line.startswith(
    f"142 TensorFlow could not form the cluster as worker 0 at {own} (Could not start"
  )
