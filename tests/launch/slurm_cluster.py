"""A real Slurm on this machine, for tests: three nodes, each with a network of its own.

Daemons and jobs live among the hosts of tests/networks.py, and end with them.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping

from tests import networks

NODES = ("node9", "node10", "node11")  # as text, node10 comes before node9
_NETWORK = networks.GATEWAY.rpartition(".")[0]
_DAEMONS = ("slurmctld", "slurmd", "munged")
_COMMANDS = ("sbatch", "srun")
_CPUS_PER_NODE = 4  # Slurm's to give away, not this machine's
_GPUS_PER_NODE = 2
_NULL_DEVICE = os.makedev(1, 3)
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
_READY_SECONDS = 20.0
_POLL_SECONDS = 0.2

_CONFIG = """
ClusterName=test
SlurmctldHost=control({controller})
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
KillWait=5
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1
PartitionName=patient Nodes=ALL State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
  """Returns why no Slurm can be started here; an empty text where one can."""
  reason = networks.missing(*_DAEMONS, *_COMMANDS)
  return reason and (
    f"{reason}; Slurm is slurm-wlm slurmctld slurmd slurm-client munge iproute2"
  )


@dataclasses.dataclass(frozen=True)
class Job:
  """What Slurm says of a job now; an exit code is such as 4:0."""

  state: str
  restarts: int
  nodes: str
  exit_code: str


class Slurm:
  """A running Slurm; a context that ends with everything in it."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    addresses = {
      node: f"{_NETWORK}.{number}" for number, node in enumerate(NODES, start=9)
    }
    self._hosts = networks.Hosts(addresses, bridge_name="control")
    self._daemons: dict[str, subprocess.Popen[bytes]] = {}

  def __enter__(self) -> Slurm:
    self._hosts.__enter__()
    try:
      self._write_files()
      self._start_daemons()
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *error: object) -> None:
    self._hosts.__exit__()
    for daemon in self._daemons.values():
      daemon.wait(timeout=30)

  def run(
    self,
    *command: str,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
  ) -> str:
    """Runs a command on the controller; returns what it wrote, or fails with it."""
    variables = {"SLURM_CONF": str(self._folder / "slurm.conf"), **(environment or {})}
    return self._hosts.run(*command, environment=variables, check=check)

  def submit(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
    """Submits a batch job; returns its number."""
    return self.run("sbatch", "--parsable", *words, environment=environment).strip()

  def job(self, number: str) -> Job:
    """Asks for a job's state; one that Slurm has forgotten is an error."""
    lines = self.run("scontrol", "--oneliner", "show", "job", number)
    facts = dict(word.partition("=")[::2] for word in lines.split())
    return Job(
      facts["JobState"], int(facts["Restarts"]), facts["NodeList"], facts["ExitCode"]
    )

  def wait(
    self, number: str, until: Callable[[Job], bool], *, seconds: float = 240
  ) -> Job:
    """Waits until the job is as wanted; fails with its state and Slurm's log."""
    deadline = time.monotonic() + seconds
    while not until(job := self.job(number)):
      if time.monotonic() > deadline:
        log = (self._folder / "slurmctld.log").read_text().splitlines()[-30:]
        raise AssertionError("\n".join([f"job {number} is {job}", *log]))
      time.sleep(_POLL_SECONDS)
    return job

  def ended(self, number: str) -> Job:
    """Waits for a job's end."""
    return self.wait(number, lambda job: job.state in _ENDED)

  def processes(self, node: str) -> Iterator[tuple[int, str]]:
    """Yields number (in the namespace) and command line of a node's processes."""
    for number in self.run("ip", "netns", "pids", node).split():
      path = f"/proc/{self._hosts.first_process}/root/proc/{number}/cmdline"
      line = pathlib.Path(path)
      if line.exists():
        yield int(number), line.read_text().replace("\0", " ")

  def take_down(self, node: str) -> None:
    """Takes a node away as a power cut would: link and processes at once."""
    self._hosts.pull(node)
    numbers = [str(number) for number, _ in self.processes(node)]
    self.run("kill", "-9", *numbers, check=False)
    self._daemons.pop(node).wait(timeout=30)

  def bring_up(self, node: str) -> None:
    """Brings a node back that was taken down."""
    self._hosts.plug(node)
    self._start_node(node)
    self._wait_for_nodes()

  def slow_down(self, *, megabytes_per_second: int | None) -> None:
    """Limits what each node receives and so how fast it trains; None lifts it."""
    for node in NODES:
      if megabytes_per_second is None:
        self._hosts.unshape(node)
      else:
        self._hosts.limit(node, megabytes_per_second=megabytes_per_second)

  def _environment(self) -> dict[str, str]:
    """Returns this process's environment, made fit for Slurm's commands."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return os.environ | {"PATH": path, "SLURM_CONF": str(self._folder / "slurm.conf")}

  def _write_files(self) -> None:
    """Writes Slurm's settings and the hosts' addresses, which all nodes then see."""
    for name in ("state", *(f"spool-{node}" for node in NODES)):
      (self._folder / name).mkdir()
    hosts = ["127.0.0.1 localhost", f"{networks.GATEWAY} control"]
    nodes, gpus = [], []
    for node, address in self._hosts.addresses.items():
      hosts.append(f"{address} {node}")
      nodes.append(
        f"NodeName={node} NodeAddr={address} CPUs={_CPUS_PER_NODE} RealMemory=4000 "
        f"Gres=gpu:{_GPUS_PER_NODE}"
      )
    for number in range(_GPUS_PER_NODE):
      gpus.append(f"Name=gpu File={self._folder}/gpu{number}")
      # Slurm hands out any device; nobody opens these
      os.mknod(self._folder / f"gpu{number}", 0o600 | stat.S_IFCHR, _NULL_DEVICE)
    text = _CONFIG.format(
      controller=networks.GATEWAY, folder=self._folder, nodes="\n".join(nodes)
    )
    (self._folder / "slurm.conf").write_text(text)
    (self._folder / "gres.conf").write_text("\n".join(gpus) + "\n")
    (self._folder / "hosts").write_text("\n".join(hosts) + "\n")
    key = self._folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    self.run("mount", "--bind", str(self._folder / "hosts"), "/etc/hosts")

  def _start_daemons(self) -> None:
    """Starts Slurm and waits until every node is idle."""
    self.run("mkdir", "-p", "/run/munge")
    files = [
      f"--{kind}-file={self._folder}/munge.{kind}"
      for kind in ("key", "pid", "log", "seed")
    ]
    self._start("munged", "munged", "--foreground", "--force", *files)
    self._start("slurmctld", "slurmctld", "-D", "-c")
    for node in NODES:
      self._start_node(node)
    self._wait_for_nodes()

  def _start_node(self, node: str) -> None:
    script = f"hostname {node}; exec slurmd -D -N {node}"
    network = f"--net=/run/netns/{node}"
    self._start(node, "nsenter", network, "unshare", "--uts", "sh", "-c", script)

  def _start(self, name: str, *command: str) -> None:
    """Starts a daemon in the namespaces; its messages go to a file of its name."""
    with open(self._folder / f"{name}.out", "ab") as output:
      self._daemons[name] = subprocess.Popen(
        [*self._hosts.enter(), *command],
        env=self._environment(),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
      )

  def _wait_for_nodes(self) -> None:
    """Waits until Slurm has all nodes."""
    deadline = time.monotonic() + _READY_SECONDS
    while True:
      states = self.run("sinfo", "--noheader", "--format=%t", check=False).split()
      if states and set(states) <= {"idle", "mix", "alloc"}:
        return
      assert time.monotonic() < deadline, f"Slurm's nodes are {states}"
      time.sleep(_POLL_SECONDS)
