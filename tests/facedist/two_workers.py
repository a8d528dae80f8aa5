"""A run of two workers that tests disturb: its flags, its processes, what it leaves."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

from facedist.data.readers import local_reader
from facedist.data.samplers import epoch_sampler
from facedist.training import metric_writer
from facedist.training.checkpoint import checkpoints
from tests import noise_sets, processes

SABOTAGE = str(pathlib.Path(__file__).with_name("sabotage.py"))
FLAGS = (
  "--strategy=multiworker",
  "--backbone=tinynet",
  "--backbone_weights=none",
  "--embedding_size=16",
  "--noembedding_batch_norm",
  "--global_batch=16",
  "--scale=16",
  "--head_epochs=0",
  "--full_epochs=4",
  "--full_rate=0.02",
  "--clip_norm=5",
  "--augment_color=0.2",
  "--log_every_steps=2",
  "--checkpoint_every_steps=10",
  "--keep_last=100",
  "--deterministic",
  "--peer_timeout=5",
  "--start_timeout=120",
)
ENDLESS = ("--backbone=speck", "--head_epochs=4000", "--full_epochs=0")  # compiles fast
TOTAL_STEPS = 40  # 160 images, 4 epochs, batches of 16
LIMIT = 200  # seconds; nothing here takes a tenth of that on an idle machine


@dataclasses.dataclass
class Run:
  """Two workers on loopback, and what they have written so far."""

  workers: list[str]
  processes: list[processes.Process]
  paths: list[pathlib.Path]

  def log(self, index: int) -> str:
    return self.paths[index].read_text()

  def wait_for(self, text: str, index: int = 0) -> None:
    """Waits until a worker has written a text."""
    deadline = time.monotonic() + LIMIT
    while text not in self.log(index):
      assert self.processes[index].poll() is None, self.log(index)
      assert time.monotonic() < deadline, self.log(index)
      time.sleep(0.02)

  def codes(self) -> list[int]:
    """Waits for the end of both; returns exit codes."""
    return [process.wait(LIMIT) for process in self.processes]


Start = Callable[..., Run]


def write_shards(folder: str) -> None:
  """Writes the noise that the run trains on."""
  noise_sets.write(folder, identities=8, images=20, size=32, shards=2)


def launch(
  workers: Sequence[str],
  index: int,
  *flags: str,
  log: pathlib.Path,
  fault: tuple[str, int] = ("none", 0),
  environment: Mapping[str, str] | None = None,
  network: str | None = None,
) -> processes.Process:
  """Starts worker `index`; its messages go to `log`.

  A fault is one of sabotage.py and its step, a network the file of a namespace.
  """
  cluster = {"worker": list(workers)}
  task = {"cluster": cluster, "task": {"type": "worker", "index": index}}
  more = {"TF_CONFIG": json.dumps(task)} | dict(environment or {})
  command = (SABOTAGE, fault[0], str(fault[1]), "--", *FLAGS, *flags)
  return processes.start(*command, log=log, environment=more, network=network)


def bad_batch(shards: str, step: int, worker: int) -> str:
  """The records of one worker's part of a step's batch."""
  records = local_reader.open_reader(shards, "train").num_records
  part = epoch_sampler.EpochSampler(records, 16, 0).slice_at(
    step, worker * 8, worker * 8 + 8
  )
  return ",".join(map(str, part.records))


def last_error(log: str) -> str:
  """The line that says why a process ended; TensorFlow may have said more since."""
  return [line for line in log.splitlines() if line.startswith("error: ")][-1]


def losses(workdir: pathlib.Path) -> dict[int, float]:
  return dict(metric_writer.step_losses(str(workdir)))


def final_files(workdir: pathlib.Path, steps: int = TOTAL_STEPS) -> dict[str, int]:
  """CRCs of the last checkpoint's data: the bits of all weights, and of rows."""
  last = checkpoints.list_checkpoints(str(workdir))[-1]
  assert last.step == steps
  marker = last.marker()
  files = marker["files"] | marker.get("rows", {"files": {}})["files"]
  return {name: file["crc32c"] for name, file in files.items() if ".index" not in name}
