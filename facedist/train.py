"""Trains a face-embedding network on shards, on one device or on many machines.

On all devices of this machine:

  python -m facedist.train --flagfile=configs/vggface2.flags \\
    --data_dir=/data/vggface2_112 --workdir=/runs/a --strategy=mirrored

On several machines the same command runs on each, with --strategy=multiworker: as the
tasks of a Slurm step, the pods of a Kubernetes job (docs/launch.md), or with TF_CONFIG
set; `python launch/local.py --workers=2 -- ...` does that on one machine.
Started again with the same --workdir, it goes on from the newest checkpoint.
--dry_run rehearses a config on random images in a minute.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf
from absl import logging

from facedist import __version__, config, errors
from facedist.data import pipeline
from facedist.distributed import detect, strategies
from facedist.distributed.cluster import Cluster as Cluster
from facedist.distributed.failure_detector import Timeouts
from facedist.distributed.supervisor import Supervisor, supervise
from facedist.preflight import checks, dry_run
from facedist.preflight import cluster as cluster_checks
from facedist.training import (
  inputs,
  schedules,
  step_health,
  train_state,
  train_step,
  trainer,
  workdir_lock,
)
from facedist.training.checkpoint import manager, uploader
from facedist.training.config import TrainConfig, resolve


def main(settings: TrainConfig) -> None:
  """Joins the cluster, then trains or rehearses."""
  settings = resolve(settings)
  if settings.deterministic:
    tf.config.experimental.enable_op_determinism()
  cluster = detect.from_environment()
  if not settings.dry_run:
    _required(settings.data_dir, "data_dir")
    _required(settings.workdir, "workdir")
  with supervise(
    cluster,
    facts={"version": __version__, "config": manager.fingerprint(settings)},
    timeouts=_timeouts(settings),
    grace_seconds=settings.grace_seconds,
    heartbeat_file=settings.heartbeat_file,
  ) as supervisor:
    # after joining, so that a problem that one worker finds ends all of them
    supervisor.detector.note("checking flags, data and workdir")
    examine(settings, cluster)
    if not settings.dry_run:
      with _workdir(settings, cluster, supervisor):
        train(settings, _join(settings, cluster, supervisor), cluster, supervisor)
      return
    strategy = _join(settings, cluster, supervisor)
    with dry_run.dry_run_phases(settings, strategy.num_replicas_in_sync) as acts:
      for act in acts:
        manager.claim_workdir(act, str(act.workdir), is_chief=cluster.is_chief)
        train(act, strategy, cluster, supervisor)
      dry_run.score_dry_run(str(acts[-1].workdir))


def examine(settings: TrainConfig, cluster: Cluster) -> None:
  """Runs the doctor's quick checks: each finding is a line of the log.

  A dry run has neither data nor workdir, so its flags alone are checked: those given,
  before the rehearsal cuts them down.

  Raises:
    errors.FacedistError: A check found what keeps this run from training.
  """
  found = [cluster_checks.check_names(cluster), *cluster_checks.check_proxies(cluster)]
  if settings.dry_run:
    found.append(checks.check_flags(settings, cluster))
  else:
    found += checks.check_run(settings, cluster, is_quick=True)
  for finding in found:
    logging.info("%s", finding)
  checks.raise_for(found)


@contextlib.contextmanager
def _workdir(
  settings: TrainConfig, cluster: Cluster, supervisor: Supervisor
) -> Iterator[None]:
  """Has the run's workdir to itself while the body runs, from the first write on."""
  workdir = str(settings.workdir)
  with contextlib.ExitStack() as held:
    if cluster.is_chief:
      lock = workdir_lock.held(
        workdir, on_loss=supervisor.end, grace_seconds=settings.grace_seconds
      )
      held.enter_context(lock)
    manager.claim_workdir(settings, workdir, is_chief=cluster.is_chief)
    yield


def _join(
  settings: TrainConfig, cluster: Cluster, supervisor: Supervisor
) -> tf.distribute.Strategy:
  """Waits for all workers and forms the strategy with them."""
  with supervisor.forming():
    strategy = strategies.make_strategy(
      settings.strategy,
      cluster,
      communication=settings.communication,
      pack_mb=settings.all_reduce_mb,
      peer_timeout=settings.peer_timeout,
    )
  logging.info("%s", strategies.describe_strategy(strategy, cluster))
  return strategy


def train(
  settings: TrainConfig,
  strategy: tf.distribute.Strategy,
  cluster: Cluster,
  supervisor: Supervisor,
) -> None:
  """Builds the parts from the config and trains to the end of the last phase."""
  supervisor.detector.note("bringing the data")
  data = inputs.open_dataset(settings)
  train_reader = inputs.open_split(settings, data, "train")
  manifest = train_reader.manifest
  plan = schedules.plan_phases(settings, train_reader.num_records)
  facts = manager.data_facts(manifest)
  trainer.log_run_header(
    settings, strategy, facts, plan, num_records=train_reader.num_records
  )
  supervisor.detector.note("building the network")
  built_state = train_state.build_train_state(
    strategy,
    settings,
    image_size=manifest.image_size,
    num_identities=manifest.num_identities,
  )
  load_errors = pipeline.LoadErrors()
  with (
    data,
    load_errors.reraised(),
    _open_run(settings, strategy, supervisor) as (monitor, box),
  ):
    batches = inputs.build_inputs(
      settings, strategy, cluster, data, train_reader, load_errors
    )
    checkpoint_manager = _saver(
      settings, strategy, built_state=built_state, box=box, facts=facts
    )
    trainer.Trainer(
      state=built_state,
      strategy=strategy,
      phases=plan,
      settings=train_step.settings_of(settings),
      inputs=batches,
      cadence=config.subset(trainer.Cadence, settings),
      course=trainer.Course(checkpoint_manager, monitor, batches.damage_limit),
      monitor=monitor,
      uploader=box,
    ).run()
  box.check()


def _saver(
  settings: TrainConfig,
  strategy: tf.distribute.Strategy,
  *,
  built_state: train_state.TrainState,
  box: uploader.Uploader,
  facts: Mapping[str, Any],
) -> manager.CheckpointManager:
  """Returns what saves and restores the state."""
  return manager.CheckpointManager(
    built_state.checkpoint(),
    strategy,
    uploader=box,
    facts=facts,
    rows=built_state.rows,
    piece_rows=settings.head_shard_rows,
  )


@contextlib.contextmanager
def _open_run(
  settings: TrainConfig,
  strategy: tf.distribute.Strategy,
  supervisor: Supervisor,
) -> Iterator[tuple[step_health.HealthMonitor, uploader.Uploader]]:
  """Yields what oversees the run and where it writes; leaves when all workers do."""
  own = step_health.StepHealth()
  supervisor.preemption.arm(own.request_stop)
  supervisor.detector.begin_training(own.count_arrivals)
  monitor = step_health.HealthMonitor(
    own, supervisor.detector, strategies.local_replicas(strategy)
  )
  with (
    monitor.together(strategy),
    uploader.open_uploader(
      str(settings.workdir),
      is_chief=monitor.is_chief,
      keep_last=settings.keep_last,
      keep_every=settings.keep_every,
    ) as box,
  ):
    yield monitor, box


def _timeouts(settings: TrainConfig) -> Timeouts:
  """Returns how long this run waits for what."""
  return Timeouts(
    start=settings.start_timeout or settings.peer_timeout,
    peer=settings.peer_timeout,
    step=settings.step_timeout,
  )


def _required(value: str | None, flag: str) -> str:
  """Returns the value of a flag that only a dry run can do without."""
  if not value:
    raise errors.UsageError(f"--{flag} is required, unless with --dry_run.")
  return value


def run() -> None:
  """Runs the command line."""
  config.run_command(main, TrainConfig)


if __name__ == "__main__":
  run()
