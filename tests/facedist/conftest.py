"""The run of two workers that nothing disturbs; what others did is compared with it."""

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


@pytest.fixture(scope="session")
def undisturbed(
  noise_shards: str, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """The workdir of both workers from start to end in one go."""
  folder = tmp_path_factory.mktemp("undisturbed")
  flags = (f"--data_dir={noise_shards}", f"--workdir={folder / 'run'}")
  workers = free_addresses(2)
  paths = [folder / f"log-{index}.txt" for index in range(2)]
  processes = [
    two_workers.launch(workers, index, *flags, log=path)
    for index, path in enumerate(paths)
  ]
  run = two_workers.Run(workers, processes, paths)
  try:
    assert run.codes() == [0, 0], run.log(0) + run.log(1)
  finally:
    for process in processes:
      process.kill()
      process.wait()
  return folder / "run"


@pytest.fixture
def start(noise_shards: str, tmp_path: pathlib.Path) -> Iterator[Start]:
  """Starts both workers, or one alone; all are killed in the end."""
  runs = []

  def start_run(
    workdir: pathlib.Path,
    *flags: str,
    fault: tuple[str, int] = ("none", 0),
    only: tuple[int, ...] = (0, 1),
    environment: Mapping[str, str] | None = None,
    own_flags: Mapping[int, tuple[str, ...]] | None = None,
    enter: tuple[str, ...] = (),
  ) -> Run:
    workers = free_addresses(2)
    processes, paths = [], []
    for index in only:
      paths.append(tmp_path / f"log-{len(runs)}-{index}.txt")
      processes.append(
        launch(
          workers,
          index,
          *(f"--data_dir={noise_shards}", f"--workdir={workdir}", *flags),
          *(own_flags or {}).get(index, ()),
          log=paths[-1],
          enter=enter,
          fault=fault,
          environment=environment,
        )
      )
    runs.append(Run(workers, processes, paths))
    return runs[-1]

  yield start_run
  for run in runs:
    for process in run.processes:
      process.kill()
      process.wait()
