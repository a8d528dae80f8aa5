"""launch/slurm on a real Slurm of three nodes; skipped where none can be started."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from facedist import errors
from facedist.data import noise
from facedist.distributed import slurm as slurm_variables
from facedist.training import metric_writer
from facedist.training.checkpoint import checkpoints
from tests import noise_sets
from tests.launch import slurm_cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SCRIPTS = pathlib.Path(__file__).parents[2] / "launch" / "slurm"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
REAL = {"FACEDIST_PYTHON": sys.executable, "TF_NUM_INTRAOP_THREADS": "1"}


@pytest.fixture(scope="module")
def slurm(
  tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[slurm_cluster.Slurm]:
  """A running Slurm."""
  if reason := slurm_cluster.missing():
    pytest.skip(reason)
  with slurm_cluster.Slurm(tmp_path_factory.mktemp("slurm")) as running:
    yield running


class Toy:
  """Jobs of train.sbatch whose tasks run a few lines of bash in the trainer's place."""

  def __init__(self, slurm: slurm_cluster.Slurm, folder: pathlib.Path):
    self._slurm, self._folder = slurm, folder

  def submit(self, name: str, lines: str, *words: str, **variables: str) -> str:
    """Submits a job of two tasks on two nodes; returns its number."""
    toy = self._folder / name
    toy.write_text(f"#!/bin/bash\nfirst=$((${{SLURM_RESTART_COUNT:-0}} == 0))\n{lines}")
    toy.chmod(0o755)
    return self._slurm.submit(
      *TWO_NODES,
      f"--output={self._folder}/{name}.log",
      *words,
      str(SCRIPTS / "train.sbatch"),
      "--workdir=/runs/a b",
      environment={"FACEDIST_PYTHON": str(toy), **variables},
    )

  def log(self, name: str) -> str:
    """Returns what the job and its tasks wrote so far."""
    path = self._folder / f"{name}.log"
    return path.read_text() if path.exists() else ""

  def ended(self, number: str) -> slurm_cluster.Job:
    """Waits for the job's end."""
    return self._slurm.wait(number, lambda job: job.state in ENDED)

  def started(self, number: str) -> None:
    """Waits for the job's start."""
    self._slurm.wait(number, lambda job: job.state != "PENDING")

  def exit_code(self, number: str) -> str:
    """Returns the job's exit code as Slurm keeps it, such as 4:0."""
    facts = self._slurm.run("scontrol", "--oneliner", "show", "job", number).split()
    return next(fact for fact in facts if fact.startswith("ExitCode="))[9:]


@pytest.fixture
def toy(slurm: slurm_cluster.Slurm, tmp_path: pathlib.Path) -> Toy:
  """Submits toys."""
  return Toy(slurm, tmp_path)


@dataclasses.dataclass(frozen=True)
class Requeued:
  """Jobs that are requeued; started together, since they mostly wait for Slurm."""

  toy: Toy
  jobs: dict[str, str]

  def ended(self, name: str) -> slurm_cluster.Job:
    """Waits for a job's end."""
    return self.toy.ended(self.jobs[name])


REQUEUED = {
  "killed": "if ((SLURM_PROCID == 1)); then kill -9 $$; fi; exec sleep 60",
  "saving": """
((first)) || exit 0
trap '' TERM
if ((SLURM_PROCID == 1)); then exit 143; fi
sleep 3
echo saved whole
exit 143
""",
  "late": """
((first)) || exit 0
trap '' TERM
((SLURM_PROCID == 0)) || sleep 2  # less than Slurm gives a task that it stops
exit 143
""",
  "limited": """
((first)) || exit 0
trap 'exit 143' USR1
sleep 60 & wait
""",
}


@pytest.fixture(scope="module")
def requeued(
  slurm: slurm_cluster.Slurm, tmp_path_factory: pytest.TempPathFactory
) -> Requeued:
  """Jobs of REQUEUED."""
  toy, jobs = Toy(slurm, tmp_path_factory.mktemp("requeued")), {}
  for name, lines in REQUEUED.items():
    restarts = "1" if name == "killed" else "0"
    limit = ("--time=1", "--signal=USR1@58") if name == "limited" else ()
    jobs[name] = toy.submit(name, lines, *limit, FACEDIST_MAX_RESTARTS=restarts)
    toy.started(jobs[name])
  return Requeued(toy, jobs)


def test_node_lists_expand_as_scontrol_does(slurm: slurm_cluster.Slurm):
  for text in ("node[9-10]", "node[10,9]", "a[008-011,1],login,b3", "r[0-1]n[1-2]"):
    by_scontrol = slurm.run("scontrol", "show", "hostnames", text).split()
    assert list(slurm_variables.expand_hosts(text)) == by_scontrol


@pytest.mark.parametrize("words", [(), ("--gpus-per-task=1",)])
def test_every_task_of_a_step_sees_the_same_workers_and_its_own_place(
  slurm: slurm_cluster.Slurm, words: tuple[str, ...]
):
  program = (
    "import json, os, socket; from facedist.distributed import detect;"
    "here = detect.from_environment(); print(json.dumps([here.index, here.workers,"
    " socket.gethostname(), os.environ.get('CUDA_VISIBLE_DEVICES')]))"
  )
  output = slurm.run(
    *("srun", "--quiet", "--nodes=2", "--ntasks-per-node=2", "--nodelist=node[9-10]"),
    *("--chdir=/", *words),
    *(sys.executable, "-c", program),
    environment={"FACEDIST_PORT": "4000"},
  )
  rows = sorted(json.loads(line) for line in output.splitlines())
  workers = ["node9:4000", "node9:4001", "node10:4000", "node10:4001"]
  assert [row[:3] for row in rows] == [
    [index, workers, worker.split(":")[0]] for index, worker in enumerate(workers)
  ]
  gpus = ["0", "1", "0", "1"] if words else [None] * 4
  assert [row[3] for row in rows] == gpus


def test_the_batch_script_gives_each_task_a_gpu_of_its_own(toy: Toy):
  line = 'echo "$SLURM_PROCID on $(hostname): GPU $CUDA_VISIBLE_DEVICES"'
  job = toy.submit("gpus", line, "--ntasks-per-node=2", "--gpus-per-task=1")
  assert toy.ended(job).state == "COMPLETED"
  found = sorted(line.split(" on ")[1] for line in toy.log("gpus").splitlines())
  hosts = sorted({line.split(":")[0] for line in found})
  assert len(hosts) == 2
  assert found == [f"{host}: GPU {gpu}" for host in hosts for gpu in (0, 1)]


def test_tasks_that_share_all_gpus_of_a_node_are_refused(slurm: slurm_cluster.Slurm):
  program = "from facedist.distributed import detect; detect.from_environment()"
  output = slurm.run(
    *("srun", "--nodes=1", "--ntasks=2", "--gres=gpu:2", "--chdir=/"),
    *(sys.executable, "-c", program),
    check=False,
  )
  assert "CUDA_VISIBLE_DEVICES=0,1 is all GPUs of the host" in output


def test_the_batch_script_itself_is_no_worker(
  slurm: slurm_cluster.Slurm, tmp_path: pathlib.Path
):
  program = (
    "from facedist.distributed import detect; found = detect.from_environment();"
    "print(found.workers, found.left_out)"
  )
  job = slurm.submit(
    *TWO_NODES,
    f"--output={tmp_path}/log",
    f"--wrap={sys.executable} -c '{program}'",
  )
  slurm.wait(job, lambda job: job.state in ENDED)
  assert (tmp_path / "log").read_text().startswith("() Slurm job")


@pytest.mark.usefixtures("requeued")  # these wait beside the ones below
def test_every_exit_code_ends_or_requeues_the_job_as_the_table_says(toy: Toy):
  jobs = {}
  for code in errors.ExitCode:
    # The other task does what a trainer does when srun stops it.
    lines = f"""
((first)) || exit 0
if ((SLURM_PROCID == 1)); then sleep 1; exit {code}; fi
((SLURM_PROCID == 0 && {code} == 0)) && exit 0
trap 'exit {errors.ExitCode.PREEMPTED}' TERM
sleep 60 & wait
"""
    if code == errors.ExitCode.PREEMPTED:  # all workers agree on it
      lines = f"((first)) || exit 0; sleep 1; exit {code}"
    jobs[code] = toy.submit(f"code-{code}", lines)
    toy.started(jobs[code])  # slurmd's heap does not always survive a volley of starts
  for code, number in jobs.items():
    job = toy.ended(number)
    if code >= 128:
      assert (job.state, job.restarts) == ("COMPLETED", 1), code
      assert f"exit code {code}: the job is requeued (restart 1)" in toy.log(
        f"code-{code}"
      )
    else:
      assert (toy.exit_code(number), job.restarts) == (f"{code}:0", 0), code
  assert "exit code 4 is permanent: the job is not requeued" in toy.log("code-4")


def test_a_permanent_code_counts_even_where_srun_reports_another_task_s_signal(
  toy: Toy,
):
  lines = f"""
if ((SLURM_PROCID == 1)); then sleep 1; exit {errors.ExitCode.DATA}; fi
trap 'kill -9 $PPID; exit' TERM
sleep 60 & wait
"""
  job = toy.submit("hidden", lines)
  ended = toy.ended(job)
  assert (ended.state, ended.restarts) == ("FAILED", 0)
  hidden = "exit code 137, but the job may not be requeued"
  seen = "exit code 4 is permanent: the job is not requeued"  # srun was fast enough
  assert hidden in toy.log("hidden") or seen in toy.log("hidden")


def test_flags_reach_every_task_whole(toy: Toy):
  job = toy.submit("flags", 'echo "$SLURM_PROCID: $(printf "<%s>" "$@")"')
  assert toy.ended(job).state == "COMPLETED"
  flags = "<-m><facedist.train><--strategy=multiworker><--workdir=/runs/a b>"
  assert sorted(toy.log("flags").splitlines()) == [f"0: {flags}", f"1: {flags}"]


def test_a_job_that_fails_again_and_again_is_given_up(requeued: Requeued):
  ended = requeued.ended("killed")
  assert (ended.state, ended.restarts) == ("FAILED", 1)
  assert requeued.toy.exit_code(requeued.jobs["killed"]) == "137:0"
  assert "FACEDIST_MAX_RESTARTS=1 forbids another" in requeued.toy.log("killed")


def test_a_cancelled_job_stays_cancelled(toy: Toy, slurm: slurm_cluster.Slurm):
  job = toy.submit("cancelled", "trap 'exit 143' TERM; echo up; sleep 60 & wait")
  slurm.wait(job, lambda job: job.state == "RUNNING")
  deadline = time.monotonic() + 30
  while toy.log("cancelled").count("up") < 2:
    assert time.monotonic() < deadline
    time.sleep(0.1)
  slurm.run("scancel", job)
  ended = toy.ended(job)
  assert (ended.state, ended.restarts) == ("CANCELLED", 0)
  assert "requeued" not in toy.log("cancelled")


def test_a_chief_that_still_saves_is_not_stopped_by_one_that_has_ended(
  requeued: Requeued,
):
  ended = requeued.ended("saving")
  assert (ended.state, ended.restarts) == ("COMPLETED", 1)  # 143 counts as no failure
  assert "saved whole" in requeued.toy.log("saving")


def test_a_task_that_comes_late_to_the_end_is_not_waited_for_nor_killed(
  requeued: Requeued,
):
  ended = requeued.ended("late")
  assert (ended.state, ended.restarts) == ("COMPLETED", 1)
  assert "exit code 143: the job is requeued (restart 1)" in requeued.toy.log("late")


def test_a_job_that_comes_to_its_time_limit_is_requeued(requeued: Requeued):
  ended = requeued.ended("limited")
  assert (ended.state, ended.restarts) == ("COMPLETED", 1)
  assert "the job is requeued (restart 1)" in requeued.toy.log("limited")


def test_a_job_that_is_preempted_saves_and_goes_on(
  toy: Toy, slurm: slurm_cluster.Slurm
):
  lines = """
((first)) || exit 0
trap 'sleep 1; echo "saved by $SLURM_PROCID"; exit 143' TERM
echo up
sleep 60 & wait
"""
  # with a grace period of its own, and with none but KillWait
  partitions = ("patient", "main")
  jobs = {name: toy.submit(name, lines, f"--partition={name}") for name in partitions}
  deadline = time.monotonic() + 60
  while any(toy.log(name).count("up") < 2 for name in partitions):
    assert time.monotonic() < deadline
    time.sleep(0.1)
  everywhere = ("--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null")
  urgent = slurm.submit(*everywhere, "--wrap=true")
  assert toy.ended(urgent).state == "COMPLETED"
  for name, job in jobs.items():
    ended = toy.ended(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), name
    saved = [f"saved by {task}" for task in range(2)]
    assert all(toy.log(name).count(text) == 1 for text in saved), toy.log(name)


FLAGS = (
  "--backbone=tinynet",
  "--backbone_weights=none",
  "--embedding_size=32",
  "--noembedding_batch_norm",
  "--global_batch=32",
  "--scale=16",
  "--head_epochs=0",
  "--full_epochs=15",
  "--full_rate=0.02",
  "--clip_norm=5",
  "--augment_flip",
  "--log_every_steps=5",
  "--checkpoint_every_steps=10",
  "--keep_last=2",
  "--deterministic",
)


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
  """A folder of shards to train on and a verification set."""
  noise_sets.write(tmp_path / "shards", identities=10, images=30, size=32, shards=3)
  noise.write_noise_verification_set(
    str(tmp_path / "pairs"), num_pairs=8, folds=2, image_size=32, seed=0
  )
  return tmp_path


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """Returns the loss of every step; a step that was repeated must repeat its loss."""
  found: dict[int, float] = {}
  for line in (workdir / metric_writer.LOG_NAME).read_text().splitlines():
    row = json.loads(line)
    if row["kind"] == "train":
      for step, loss in enumerate(
        row["losses"], start=row["step"] - len(row["losses"])
      ):
        assert found.setdefault(step, loss) == loss, step
  assert sorted(found) == list(range(len(found)))
  return found


def wait_for_progress(workdir: pathlib.Path, *, seconds: float = 240) -> None:
  """Waits until the run has saved a step that it had not when this was called."""
  before = [found.step for found in checkpoints.list_checkpoints(str(workdir))]
  deadline = time.monotonic() + seconds
  while True:
    now = [found.step for found in checkpoints.list_checkpoints(str(workdir))]
    if max(now, default=0) > max(before, default=0):
      return
    assert time.monotonic() < deadline, f"no step after {before} was saved"
    time.sleep(0.1)


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns all saved tensors of the last checkpoint, by name."""
  import tensorflow as tf

  newest = checkpoints.list_checkpoints(str(workdir))[-1]
  reader = tf.train.load_checkpoint(newest.path)
  names = reader.get_variable_to_dtype_map()
  return {
    name: reader.get_tensor(name) for name, kind in names.items() if kind != tf.string
  }


@pytest.mark.timeout(900)
def test_a_run_that_loses_a_node_and_is_told_to_stop_ends_as_an_undisturbed_one(
  slurm: slurm_cluster.Slurm, data: pathlib.Path
):
  calm, stormy = data / "calm", data / "stormy"
  evaluator = slurm.submit(
    f"--output={data}/evaluate.log",
    "--nodelist=node11",
    str(SCRIPTS / "evaluate.sbatch"),
    f"--workdir={stormy}",
    f"--verification_data={data}/pairs",
    "--poll_seconds=0.5",
    environment=REAL,
  )
  slurm.slow_down(megabytes_per_second=12)  # else the run ends before all has happened
  run = slurm.submit(
    *(*TWO_NODES, f"--output={data}/stormy.log"),
    str(SCRIPTS / "train.sbatch"),
    *(*FLAGS, f"--data_dir={data}/shards", f"--workdir={stormy}"),
    environment=REAL,
  )
  wait_for_progress(stormy)
  assert slurm.job(run).nodes == "node[9-10]"
  slurm.take_down("node9")  # where the chief and the batch script are
  # The run that nothing disturbs, while Slurm waits for the node to come back.
  reference = slurm.submit(
    *("--nodes=1", "--ntasks-per-node=2", "--nodelist=node11"),
    f"--output={data}/calm.log",
    str(SCRIPTS / "train.sbatch"),
    *(*FLAGS, f"--data_dir={data}/shards", f"--workdir={calm}"),
    environment=REAL,
  )
  moved = slurm.wait(run, lambda job: (job.state, job.restarts) == ("RUNNING", 1))
  assert moved.nodes == "node[10-11]"
  wait_for_progress(stormy)
  slurm.run("scancel", "--signal=USR1", run)  # as Slurm does before the time limit
  slurm.wait(run, lambda job: job.restarts == 2)
  slurm.slow_down(megabytes_per_second=None)
  ended = slurm.wait(run, lambda job: job.state in ENDED)
  assert (ended.state, ended.restarts) == ("COMPLETED", 2), (
    data / "stormy.log"
  ).read_text()
  assert (
    "exit code 143: the job is requeued (restart 2)"
    in (data / "stormy.log").read_text()
  )
  assert slurm.wait(reference, lambda job: job.state in ENDED).state == "COMPLETED"
  expected = losses(calm)
  assert losses(stormy) == expected
  assert len(expected) == 141  # 300 images, batches of 32, 15 epochs
  before, after = weights(calm), weights(stormy)
  assert before.keys() == after.keys()
  for name, value in before.items():
    np.testing.assert_array_equal(after[name], value, err_msg=name)
  assert slurm.wait(evaluator, lambda job: job.state in ENDED).state == "COMPLETED"
  rows = (stormy / "metrics.jsonl").read_text().splitlines()
  steps = [json.loads(row)["step"] for row in rows]
  assert steps == sorted(set(steps))
  assert steps[-1] == len(expected)
  slurm.bring_up("node9")


def test_an_array_and_a_job_after_it_build_what_one_process_builds(
  slurm: slurm_cluster.Slurm, tmp_path: pathlib.Path
):
  for number in range(12):
    path = tmp_path / "train" / f"n{number % 3:06d}" / f"{number:04d}_01.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
    assert cv2.imwrite(str(path), pixels)
  flags = [
    *("--dataset=vggface2", f"--input_dir={tmp_path}/train", "--landmarks=none"),
    *("--bounding_boxes=none", "--missing_row=crop", "--image_size=32"),
    *("--num_shards=3", "--num_processes=1"),
  ]
  alone, together = tmp_path / "alone", tmp_path / "together"
  subprocess.run(
    [sys.executable, "-m", "tfrecords_tools.build", *flags, f"--output_dir={alone}"],
    check=True,
    timeout=120,
  )
  flags += [f"--output_dir={together}", "--num_tasks=3"]
  script = (f"--output={tmp_path}/log-%a", str(SCRIPTS / "build_shards.sbatch"), *flags)
  array = slurm.submit("--array=0-2", *script, environment=REAL)
  last = slurm.submit(
    f"--dependency=afterok:{array}", *script, "--finalize", environment=REAL
  )
  ended = slurm.wait(last, lambda job: job.state in ENDED)
  logs_of_all = "".join(path.read_text() for path in tmp_path.glob("log-*"))
  assert ended.state == "COMPLETED", logs_of_all
  for path in alone.glob("[a-z]*"):  # the hidden folder holds the builder's state
    assert (together / path.name).read_bytes() == path.read_bytes(), path.name
  assert len(list(together.glob("*.tfrecord"))) == 3


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_nothing_of_a_cluster_is_left_when_its_holder_ends(
  slurm: slurm_cluster.Slurm, tmp_path: pathlib.Path, how: str
):
  """The module's Slurm runs beside it, so a second one is possible at the same time."""
  program = f"""
import pathlib, sys
from tests.launch import slurm_cluster
with slurm_cluster.Slurm(pathlib.Path({str(tmp_path)!r})) as running:
  print(*running.daemons(), flush=True)
  if {how == "killed"}:
    import os
    os.kill(os.getpid(), 9)
"""
  result = subprocess.run(
    [sys.executable, "-c", program],
    env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    stdout=subprocess.PIPE,
    text=True,
    timeout=60,
    check=False,
  )
  assert result.returncode == (0 if how == "closed" else -9)
  numbers = [int(number) for number in result.stdout.split()]
  assert len(numbers) == 5
  deadline = time.monotonic() + 20
  while any(pathlib.Path(f"/proc/{number}").exists() for number in numbers):
    assert time.monotonic() < deadline
    time.sleep(0.1)
