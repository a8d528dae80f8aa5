"""Hosts of their own on this machine, for tests: a network namespace each, on a bridge.

Processes, networks and mounts live in a process namespace whose first process waits for
the end of a pipe that the test holds. However the test ends, the kernel then ends all
of it, and nothing is left to clean up.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

GATEWAY = "10.77.0.1"
_TOOLS = ("ip", "tc", "nsenter", "unshare", "mount")
_CABLE = str(pathlib.Path(__file__).with_name("cable.py"))
_READY_SECONDS = 20.0
_UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc")
_UNSHARE += ("--net", "--uts")


def missing(*programs: str) -> str:
  """Returns why no hosts can have these programs here; an empty text if they can."""
  if os.geteuid() != 0:
    return "network namespaces need root"
  absent = [
    name for name in (*programs, *_TOOLS) if not shutil.which(name, path=_path())
  ]
  if absent:
    return f"not installed: {', '.join(absent)}"
  probe = subprocess.run(
    [*_UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/run"], check=False, timeout=30
  )
  return "" if probe.returncode == 0 else "namespaces are not allowed here"


class Hosts:
  """Hosts on a bridge, which itself has the address GATEWAY; a context.

  A host's end of its link is eth0; the other end, at the bridge, is `to-NAME`.
  """

  def __init__(self, addresses: Mapping[str, str], *, bridge_name: str = "bridge"):
    """Takes addresses of one /24 with GATEWAY, and the host name outside all hosts."""
    self.addresses = dict(addresses)
    self._bridge_name = bridge_name

  def __enter__(self) -> Hosts:
    # bash, because the first process of a namespace has to reap its orphans
    self._sandbox = subprocess.Popen(
      [*_UNSHARE, "bash", "-c", "read"], stdin=subprocess.PIPE
    )
    try:
      self.first_process = self._find_first_process()
      self._set_up()
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *error: object) -> None:
    assert self._sandbox.stdin is not None
    self._sandbox.stdin.close()
    self._sandbox.wait(timeout=30)

  def enter(self, host: str | None = None) -> list[str]:
    """Returns the start of a command that runs on a host, or on the bridge."""
    kinds = ("--mount", "--net", "--pid", "--uts")
    inside = [_find("nsenter"), f"--target={self.first_process}", *kinds]
    if host is not None:
      inside += [_find("nsenter"), f"--net=/run/netns/{host}"]
    return inside

  def network(self, host: str) -> str:
    """Returns the file of a host's network namespace, as seen from outside."""
    return f"/proc/{self.first_process}/root/run/netns/{host}"

  def run(
    self,
    *command: str,
    host: str | None = None,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
  ) -> str:
    """Runs a command on a host or the bridge; returns what it wrote, or fails."""
    result = subprocess.run(
      [*self.enter(host), *command],
      env=os.environ | {"PATH": _path()} | (environment or {}),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=120,
      check=False,
    )
    assert result.returncode == 0 or not check, f"{command}: {result.stdout}"
    return result.stdout

  def pull(self, host: str) -> None:
    """Pulls the host's cable out of the bridge; it keeps its address."""
    self.run("ip", "link", "set", f"to-{host}", "down")

  def plug(self, host: str) -> None:
    """Puts the cable back."""
    self.run("ip", "link", "set", f"to-{host}", "up")

  def shut(self, host: str) -> None:
    """Takes the host's own interface down, and its routes with it."""
    self.run("ip", "link", "set", "eth0", "down", host=host)

  def open(self, host: str) -> None:
    """Takes the host's own interface up again."""
    self.run("ip", "link", "set", "eth0", "up", host=host)

  def drop_incoming(self, host: str) -> None:
    """Drops all packets to a host, TCP, UDP and ARP; those from it pass.

    A bucket of one byte lets no packet through, and every kernel has one. The host
    need not ask for the others' hardware addresses, whose answers would be dropped.
    """
    for other, address in self.addresses.items():
      if other != host:
        words = (address, "lladdr", _hardware_address(address), "dev", "eth0")
        self.run("ip", "neighbour", "replace", *words, host=host)
    self._shape(host, "rate", "8bit", "burst", "1b", "limit", "1")

  def limit(self, host: str, *, megabytes_per_second: int) -> None:
    """Limits how fast a host receives."""
    rate = f"{8 * megabytes_per_second}mbit"
    self._shape(host, "rate", rate, "burst", "256kb", "latency", "500ms")

  def unshape(self, host: str) -> None:
    """Ends `drop_incoming` and `limit`, if there is one to end."""
    self.run("tc", "qdisc", "delete", "dev", f"to-{host}", "root", check=False)

  @contextlib.contextmanager
  def far(
    self, host: str, *, milliseconds: float, megabits_per_second: float
  ) -> Iterator[None]:
    """Has a long and thin cable to a host while the body runs; both are each way."""
    self.run("ip", "link", "delete", f"to-{host}")
    ends = (f"to-{host}", f"/run/netns/{host}")
    cable = subprocess.Popen(
      [
        *(*self.enter(), sys.executable, _CABLE, *ends),
        *(str(milliseconds), str(megabits_per_second)),
      ],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    assert cable.stdin is not None
    assert cable.stdout is not None
    try:
      assert cable.stdout.readline() == b"ready\n"
      self.run("sh", "-ec", "\n".join(self._plugged_in(host)))
      yield
    finally:
      cable.stdin.close()  # that ends it
      cable.wait(timeout=30)
      cable.stdout.close()
      self.run("sh", "-ec", "\n".join([self._cable_of(host), *self._plugged_in(host)]))

  def _shape(self, host: str, *words: str) -> None:
    """Sets how packets to a host are queued."""
    self.run("tc", "qdisc", "replace", "dev", f"to-{host}", "root", "tbf", *words)

  def _set_up(self) -> None:
    """Makes the bridge and the hosts."""
    lines = ["mount --make-rprivate /", "mount -t tmpfs tmpfs /run"]
    lines += [f"hostname {self._bridge_name}", "ip link set lo up"]
    lines += ["ip link add nodes type bridge", f"ip address add {GATEWAY}/24 dev nodes"]
    lines += ["ip link set nodes up"]
    for host in self.addresses:
      lines += [f"ip netns add {host}", self._cable_of(host), *self._plugged_in(host)]
      lines += [f"nsenter --net=/run/netns/{host} ip link set lo up"]
    self.run("sh", "-ec", "\n".join(lines))

  def _cable_of(self, host: str) -> str:
    """Returns the command that makes a plain cable."""
    return f"ip link add to-{host} type veth peer name eth0 netns {host}"

  def _plugged_in(self, host: str) -> list[str]:
    """Returns the commands that connect both ends of a host's cable."""
    inside = f"nsenter --net=/run/netns/{host}"
    address = self.addresses[host]
    return [
      f"{inside} ip link set eth0 address {_hardware_address(address)}",
      f"ip link set to-{host} master nodes up",
      f"{inside} ip address add {address}/24 dev eth0",
      f"{inside} ip link set eth0 up",
    ]

  def _find_first_process(self) -> int:
    """Returns the number, outside, of the namespace's first process."""
    children = f"/proc/{self._sandbox.pid}/task/{self._sandbox.pid}/children"
    deadline = time.monotonic() + _READY_SECONDS
    while not (found := pathlib.Path(children).read_text().split()):
      assert time.monotonic() < deadline, "the namespace did not start"
      time.sleep(0.01)
    return int(found[0])


def _hardware_address(address: str) -> str:
  """Returns an interface's, always the same, so that what others learn stays true."""
  return ":".join(["02", "00", *(f"{int(part):02x}" for part in address.split("."))])


def _path() -> str:
  """Returns where programs lie, those for root included."""
  return os.environ["PATH"] + ":/usr/sbin:/sbin"


def _find(program: str) -> str:
  """Returns the path of a program for root."""
  found = shutil.which(program, path=_path())
  assert found is not None, program
  return found
