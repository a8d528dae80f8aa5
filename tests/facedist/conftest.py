"""The run of two workers that nothing disturbs; what others did is compared with it."""

import pathlib

import pytest

from tests.facedist import two_workers


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
  workers = two_workers.free_addresses()
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
