"""The run of two workers that nothing disturbs; what others did is compared with it."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping

import pytest

from facedist.distributed.detect import free_addresses
from tests.facedist import two_workers
from tests.facedist.two_workers import Run, Start, launch


@pytest.fixture(scope="session")
def noise_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
  """The folder of the noise that runs of two workers train on."""
  folder = str(tmp_path_factory.mktemp("shards"))
  two_workers.write_shards(folder)
  return folder


@contextlib.contextmanager
def starting(shards: str, folder: pathlib.Path) -> Iterator[Start]:
  """Starts all workers of a run, or some alone; all are killed in the end."""
  runs: list[Run] = []

  def start_run(
    workdir: pathlib.Path,
    *flags: str,
    fault: tuple[str, int] = ("none", 0),
    workers: int = 2,
    only: tuple[int, ...] | None = None,
    environment: Mapping[str, str] | None = None,
    own_flags: Mapping[int, tuple[str, ...]] | None = None,
  ) -> Run:
    run = Run(free_addresses(workers), [], [])
    runs.append(run)
    for index in range(workers) if only is None else only:
      run.paths.append(folder / f"log-{len(runs)}-{index}.txt")
      process = launch(
        run.workers,
        index,
        *(f"--data_dir={shards}", f"--workdir={workdir}", *flags),
        *(own_flags or {}).get(index, ()),
        log=run.paths[-1],
        fault=fault,
        environment=environment,
      )
      run.processes.append(process)
    return run

  try:
    yield start_run
  finally:
    for process in (process for run in runs for process in run.processes):
      process.kill()
      process.wait()


@pytest.fixture(scope="session")
def undisturbed(
  noise_shards: str, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """The workdir of both workers from start to end in one go."""
  folder = tmp_path_factory.mktemp("undisturbed")
  with starting(noise_shards, folder) as start:
    run = start(folder / "run")
    assert run.codes() == [0, 0], run.log(0) + run.log(1)
  return folder / "run"


@pytest.fixture
def start(noise_shards: str, tmp_path: pathlib.Path) -> Iterator[Start]:
  with starting(noise_shards, tmp_path) as start_run:
    yield start_run
