"""Commands as processes of their own, forked from one that has TensorFlow imported.

To import it takes longer than most of what the tests' commands do then. A forked
command has its own flags, environment, output and signals and ends with its exit code,
as one that was executed; those of launchers are executed. It also has the backbone
that only tests have.
"""

import atexit
import ctypes
import importlib
import multiprocessing
import os
import pathlib
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import context, forkserver

_PRELOADED = ["facedist.train", "facedist.evaluate", "facedist.embed"]
_NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET; Python 3.12 has os.setns
_SERVER = multiprocessing.get_context("forkserver")


class Process(context.ForkServerProcess):
  """A running command, with what tests use of `subprocess.Popen`."""

  @property
  def returncode(self) -> int | None:
    return self.exitcode

  def poll(self) -> int | None:
    return self.exitcode

  def wait(self, timeout: float | None = None) -> int:
    """Waits for the end; returns the exit code, or minus the signal's number."""
    self.join(timeout)
    if self.exitcode is None:
      raise subprocess.TimeoutExpired(self.name, timeout or 0.0)
    return self.exitcode

  def send_signal(self, number: int) -> None:
    if self.poll() is None and self.pid is not None:
      os.kill(self.pid, number)


def without_notices(stderr: str) -> str:
  """Drops what TensorFlow 2.21 prints when it is imported, at every log level."""
  notice = r"^(WARNING: All log messages before absl|I0000 .* (port|cudart_stub)\.cc:)"
  lines = stderr.splitlines(keepends=True)
  return "".join(line for line in lines if not re.match(notice, line))


def start_server() -> None:
  """Starts the process that commands are forked from.

  A process has one such server and the builder asks for one without TensorFlow, so this
  one comes before any test.
  """
  _SERVER.set_forkserver_preload(_PRELOADED)
  forkserver.ensure_running()


def start(
  command: str,
  *flags: str,
  log: pathlib.Path,
  environment: Mapping[str, str] | None = None,
  network: str | None = None,
) -> Process:
  """Starts a command, a module or a script's path; returns while it runs.

  What it writes goes to `log`. `environment` has variables besides this process's,
  `network` is the file of another network namespace.
  """
  variables = os.environ | dict(environment or {})
  arguments = (command, flags, str(log), variables, os.getcwd(), network)
  process = Process(target=_run, args=arguments, name=command)
  log.touch()
  process.start()
  return process


def run(
  command: str,
  *flags: str,
  environment: Mapping[str, str] | None = None,
  timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
  """Runs a command to its end; what it wrote is the result's `stderr`."""
  with tempfile.TemporaryDirectory() as folder:
    log = pathlib.Path(folder) / "log"
    process = start(command, *flags, log=log, environment=environment)
    try:
      code = process.wait(timeout)
    finally:
      process.kill()
    return subprocess.CompletedProcess((command, *flags), code, "", log.read_text())


def _run(
  command: str,
  flags: tuple[str, ...],
  log: str,
  environment: dict[str, str],
  folder: str,
  network: str | None,
) -> None:
  """Becomes the command; runs in the forked process."""
  if network is not None:
    _enter_network(network)
  output = os.open(log, os.O_WRONLY | os.O_APPEND)
  for stream in (1, 2):
    os.dup2(output, stream)
  os.close(output)
  os.environ.clear()
  os.environ.update(environment)
  os.chdir(folder)
  tempfile.tempdir = None
  importlib.import_module("tests.speck").register()
  sys.argv = [command, *flags]
  try:
    if command.endswith(".py"):
      runpy.run_path(command, run_name="__main__")
    else:
      importlib.import_module(command).run()
  finally:
    atexit._run_exitfuncs()


def _enter_network(path: str) -> None:
  """Moves this process into a network namespace."""
  libc = ctypes.CDLL(None, use_errno=True)
  with open(path, "rb") as namespace:
    if libc.setns(namespace.fileno(), _NETWORK_NAMESPACE):
      raise OSError(ctypes.get_errno(), "setns", path)
