"""launch/slurm on a real Slurm of three nodes; skipped where none can be started."""

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from facedist import errors
from facedist.data import noise
from facedist.distributed import slurm as slurm_variables
from facedist.training import metric_writer
from facedist.training.checkpoint import checkpoints
from tests import noise_sets
from tests.facedist import two_workers
from tests.launch import slurm_cluster
from tests.launch.slurm_cluster import Slurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SCRIPTS = pathlib.Path(__file__).parents[2] / "launch" / "slurm"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
REAL = {"FACEDIST_PYTHON": sys.executable, "TF_NUM_INTRAOP_THREADS": "1"}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
  """A running Slurm."""
  if reason := slurm_cluster.missing():
    pytest.skip(reason)
  with Slurm(tmp_path_factory.mktemp("slurm")) as running:
    yield running


class Toy:
  """Jobs of train.sbatch whose tasks run a few lines of bash in the trainer's place."""

  def __init__(self, slurm: Slurm, folder: pathlib.Path):
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

  def wait_for(self, text: str, name: str) -> None:
    """Waits until both tasks of a job have written a text."""
    deadline = time.monotonic() + 60
    while self.log(name).count(text) < 2:
      assert time.monotonic() < deadline
      time.sleep(0.1)


@pytest.fixture
def toy(slurm: Slurm, tmp_path: pathlib.Path) -> Toy:
  """Submits toys."""
  return Toy(slurm, tmp_path)


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
  slurm: Slurm, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Toy, dict[str, str]]:
  """Jobs of REQUEUED, started together, since they mostly wait for Slurm."""
  toy, jobs = Toy(slurm, tmp_path_factory.mktemp("requeued")), {}
  for name, lines in REQUEUED.items():
    restarts = "1" if name == "killed" else "0"
    limit = ("--time=1", "--signal=USR1@45") if name == "limited" else ()
    jobs[name] = toy.submit(name, lines, *limit, FACEDIST_MAX_RESTARTS=restarts)
    slurm.wait(jobs[name], lambda job: job.state != "PENDING")
  return toy, jobs


def test_node_lists_expand_as_scontrol_does(slurm: Slurm):
  for text in ("node[9-10]", "node[10,9]", "a[008-011,1],login,b3", "r[0-1]n[1-2]"):
    by_scontrol = slurm.run("scontrol", "show", "hostnames", text).split()
    assert list(slurm_variables.expand_hosts(text)) == by_scontrol


def test_every_task_of_a_step_sees_the_same_workers_and_its_own_place(
  slurm: Slurm,
):
  program = (
    "import json, socket; from facedist.distributed import detect;"
    "here = detect.from_environment();"
    "print(json.dumps([here.index, here.workers, socket.gethostname()]))"
  )
  output = slurm.run(
    *("srun", "--quiet", "--nodes=2", "--ntasks-per-node=2", "--nodelist=node[9-10]"),
    *("--chdir=/", sys.executable, "-c", program),
    environment={"FACEDIST_PORT": "4000"},
  )
  workers = ["node9:4000", "node9:4001", "node10:4000", "node10:4001"]
  assert sorted(json.loads(line) for line in output.splitlines()) == [
    [index, workers, worker.split(":")[0]] for index, worker in enumerate(workers)
  ]


def test_the_batch_script_gives_each_task_its_flags_and_a_gpu_of_its_own(
  toy: Toy, slurm: Slurm
):
  line = 'echo "$(hostname): GPU $CUDA_VISIBLE_DEVICES$(printf " <%s>" "$@")"'
  job = toy.submit("gpus", line, "--ntasks-per-node=2", "--gpus-per-task=1")
  assert slurm.ended(job).state == "COMPLETED"
  found = sorted(toy.log("gpus").splitlines())
  hosts = sorted({line.split(":")[0] for line in found})
  assert len(hosts) == 2
  flags = "<-m> <facedist.train> <--strategy=multiworker> <--workdir=/runs/a b>"
  assert found == [f"{host}: GPU {gpu} {flags}" for host in hosts for gpu in (0, 1)]


def test_the_batch_script_itself_is_no_worker(slurm: Slurm, tmp_path: pathlib.Path):
  program = (
    "from facedist.distributed import detect; found = detect.from_environment();"
    "print(found.workers, found.left_out)"
  )
  script = f"--wrap={sys.executable} -c '{program}'"
  job = slurm.submit(*TWO_NODES, f"--output={tmp_path}/log", script)
  slurm.ended(job)
  assert (tmp_path / "log").read_text().startswith("() Slurm job")


@pytest.mark.usefixtures("requeued")  # these wait beside the ones below
def test_an_exit_code_ends_or_requeues_the_job(toy: Toy, slurm: Slurm):
  """The others are in tests/test_exit_codes.py."""
  jobs = {}
  for code in (0, 4, 143, 144):
    # The other task does what a trainer does when srun stops it.
    lines = f"""
((first)) || exit 0
if ((SLURM_PROCID == 1)); then sleep 1; exit {code}; fi
((SLURM_PROCID == 0 && {code} == 0)) && exit 0
trap 'exit 143' TERM
sleep 60 & wait
"""
    if code == 143:  # all workers agree on it
      lines = f"((first)) || exit 0; sleep 1; exit {code}"
    jobs[code] = toy.submit(f"code-{code}", lines)
    slurm.wait(jobs[code], lambda job: job.state != "PENDING")
    # slurmd's heap does not always survive a volley of starts
  for code, number in jobs.items():
    job, log = slurm.ended(number), toy.log(f"code-{code}")
    if code >= 128:
      assert (job.state, job.restarts) == ("COMPLETED", 1), code
      assert f"exit code {code}: the job is requeued (restart 1)" in log
    else:
      assert (job.exit_code, job.restarts) == (f"{code}:0", 0), code
  assert "exit code 4 is permanent: the job is not requeued" in toy.log("code-4")


def test_a_permanent_code_counts_even_where_srun_reports_another_task_s_signal(
  toy: Toy, slurm: Slurm
):
  lines = f"""
if ((SLURM_PROCID == 1)); then sleep 1; exit {errors.ExitCode.DATA}; fi
trap 'kill -9 $PPID; exit' TERM
sleep 60 & wait
"""
  job = toy.submit("hidden", lines)
  ended = slurm.ended(job)
  assert (ended.state, ended.restarts) == ("FAILED", 0)
  hidden = "exit code 137, but the job may not be requeued"
  seen = "exit code 4 is permanent: the job is not requeued"  # srun was fast enough
  assert hidden in toy.log("hidden") or seen in toy.log("hidden")


def test_a_job_that_fails_again_and_again_is_given_up(requeued, slurm: Slurm):
  toy, jobs = requeued
  ended = slurm.ended(jobs["killed"])
  assert (ended.state, ended.restarts) == ("FAILED", 1)
  assert ended.exit_code == "137:0"
  assert "FACEDIST_MAX_RESTARTS=1 forbids another" in toy.log("killed")


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("saving", "saved whole"),  # by the chief, while the other task has ended
    ("late", "exit code 143: the job is requeued (restart 1)"),  # not waited for
    ("limited", "the job is requeued (restart 1)"),  # before its time limit
  ],
)
def test_a_job_that_was_asked_to_stop_is_requeued(
  requeued, slurm: Slurm, name: str, says: str
):
  toy, jobs = requeued
  ended = slurm.ended(jobs[name])
  assert (ended.state, ended.restarts) == ("COMPLETED", 1)  # 143 counts as no failure
  assert says in toy.log(name)


def test_a_cancelled_job_stays_cancelled(toy: Toy, slurm: Slurm):
  job = toy.submit("cancelled", "trap 'exit 143' TERM; echo up; sleep 60 & wait")
  slurm.wait(job, lambda job: job.state == "RUNNING")
  toy.wait_for("up", "cancelled")
  slurm.run("scancel", job)
  ended = slurm.ended(job)
  assert (ended.state, ended.restarts) == ("CANCELLED", 0)
  assert "requeued" not in toy.log("cancelled")


def test_a_job_that_is_preempted_saves_and_goes_on(toy: Toy, slurm: Slurm):
  lines = """
((first)) || exit 0
trap 'sleep 1; echo "saved by $SLURM_PROCID"; exit 143' TERM
echo up
sleep 60 & wait
"""
  # with a grace period of its own, and with none but KillWait
  partitions = ("patient", "main")
  jobs = {name: toy.submit(name, lines, f"--partition={name}") for name in partitions}
  for name in partitions:
    toy.wait_for("up", name)
  everywhere = ("--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null")
  urgent = slurm.submit(*everywhere, "--wrap=true")
  assert slurm.ended(urgent).state == "COMPLETED"
  for name, job in jobs.items():
    ended = slurm.ended(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), name
    saved = [f"saved by {task}" for task in range(2)]
    assert all(toy.log(name).count(text) == 1 for text in saved), toy.log(name)


FLAGS = (
  *two_workers.FLAGS,
  *("--full_epochs=15", "--global_batch=32", "--embedding_size=32"),
  *("--keep_last=2", "--peer_timeout=60"),
)


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """Returns the loss of every step; a step that was repeated must repeat its loss."""
  found: dict[int, float] = {}
  for line in (workdir / metric_writer.LOG_NAME).read_text().splitlines():
    row = json.loads(line)
    if row["kind"] == "train":
      first = row["step"] - len(row["losses"])
      for step, loss in enumerate(row["losses"], start=first):
        assert found.setdefault(step, loss) == loss, step
  assert sorted(found) == list(range(len(found)))
  return found


def wait_for_progress(workdir: pathlib.Path) -> None:
  """Waits until the run has saved a step that it had not when this was called."""

  def newest() -> int:
    found = checkpoints.list_checkpoints(str(workdir))
    return found[-1].step if found else 0

  before, deadline = newest(), time.monotonic() + 240
  while newest() <= before:
    assert time.monotonic() < deadline, f"no step after {before} was saved"
    time.sleep(0.1)


@pytest.mark.timeout(900)
def test_a_run_that_loses_a_node_and_is_told_to_stop_ends_as_an_undisturbed_one(
  slurm: Slurm, tmp_path: pathlib.Path
):
  data, calm, stormy = tmp_path, tmp_path / "calm", tmp_path / "stormy"
  noise_sets.write(data / "shards", identities=10, images=30, size=32, shards=3)
  noise.write_noise_verification_set(
    str(data / "pairs"), num_pairs=8, folds=2, image_size=32, seed=0
  )
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
  ended = slurm.ended(run)
  log = (data / "stormy.log").read_text()
  assert (ended.state, ended.restarts) == ("COMPLETED", 2), log
  assert "exit code 143: the job is requeued (restart 2)" in log
  assert slurm.ended(reference).state == "COMPLETED"
  expected = losses(calm)
  assert losses(stormy) == expected
  steps = 141  # 300 images, batches of 32, 15 epochs
  assert len(expected) == steps
  weights = two_workers.final_files(calm, steps)
  assert two_workers.final_files(stormy, steps) == weights
  assert slurm.ended(evaluator).state == "COMPLETED"
  rows = (stormy / "metrics.jsonl").read_text().splitlines()
  scored = [json.loads(row)["step"] for row in rows]
  assert scored == sorted(set(scored))
  assert scored[-1] == steps
  slurm.bring_up("node9")


def test_an_array_and_a_job_after_it_build_what_one_process_builds(
  slurm: Slurm, tmp_path: pathlib.Path
):
  flags = ["--dataset=digits", "--image_size=16", "--max_images_per_identity=4"]
  flags += ["--num_shards=3", "--num_processes=1"]
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
  ended = slurm.ended(last)
  logs_of_all = "".join(path.read_text() for path in tmp_path.glob("log-*"))
  assert ended.state == "COMPLETED", logs_of_all
  for path in alone.glob("[a-z]*"):  # the hidden folder holds the builder's state
    assert (together / path.name).read_bytes() == path.read_bytes(), path.name
  assert len(list(together.glob("*.tfrecord"))) == 3
