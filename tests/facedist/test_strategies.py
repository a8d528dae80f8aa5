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


def test_a_description_names_replicas_and_place():
  strategy = strategies.make_strategy("mirrored", Cluster())
  assert strategies.describe_strategy(strategy, Cluster()) == (
    "--strategy=mirrored: 2 replicas = 1 workers x 2 CPU"
  )


def test_an_unknown_strategy_lists_the_known_ones():
  with pytest.raises(errors.UsageError, match="mirrored, multiworker, one"):
    strategies.make_strategy("horovod", Cluster())


@pytest.mark.parametrize("name", ["one", "mirrored"])
def test_a_strategy_of_one_machine_refuses_a_cluster_of_two(name: str):
  with pytest.raises(errors.UsageError, match="use --strategy=multiworker"):
    strategies.make_strategy(name, Cluster(TWO, 0))


def test_multiworker_outside_its_cluster_is_refused():
  left_out = Cluster(left_out="srun did not start this process; use srun")
  with pytest.raises(errors.UsageError, match="multiworker: srun did not start"):
    strategies.make_strategy("multiworker", left_out)


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


def test_an_unknown_communication_lists_the_known_ones():
  with pytest.raises(errors.UsageError, match="auto, nccl, ring"):
    strategies.make_strategy("multiworker", ONE, communication="mpi")


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


def tf_config(workers: Sequence[str], index: int) -> str:
  task = {"type": "worker", "index": index}
  return json.dumps({"cluster": {"worker": workers}, "task": task})


@pytest.mark.slow
def test_two_workers_reach_a_barrier_past_any_proxy_and_end_on_sigterm():
  proxies = {  # that nobody answers at
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
  }
  workers = detect.free_addresses(2)
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", WORKER],
      env=os.environ | proxies | {"TF_CONFIG": tf_config(workers, index)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
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
  program = """
from facedist.distributed import detect
from facedist import errors
from facedist.distributed import collectives, strategies
try:
  strategies.make_strategy("multiworker", detect.from_environment())
except errors.FacedistError as error:
  print(int(error.exit_code), error)
"""
  (own,) = detect.free_addresses(1)
  with socket.create_server(("127.0.0.1", int(own.rpartition(":")[2]))):
    result = subprocess.run(
      [sys.executable, "-c", program],
      env=os.environ | {"TF_CONFIG": tf_config([own, "127.0.0.1:1"], 0)},
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )
  (line,) = result.stdout.splitlines()
  assert line.startswith(
    f"142 TensorFlow could not form the cluster as worker 0 at {own} (Could not start"
  )
