"""Trains a face-embedding network on shards, on one device or on many machines.

On all devices of this machine:

  python -m facedist.train --flagfile=configs/vggface2.flags \\
    --data_dir=/data/vggface2_112 --workdir=/runs/a --strategy=mirrored

On several machines the same command runs on each, with --strategy=multiworker: as the
tasks of a Slurm step, the pods of a Kubernetes job (docs/launch.md), or with TF_CONFIG
set; `python launch/local.py --workers=2 -- ...` does that on one machine.
Started again with the same --workdir, it continues from the newest checkpoint.
--dry_run tries a config on random images in a minute.
"""

import contextlib
import functools
from collections.abc import Iterator

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
  """Trains a network; with --dry_run, tries the config on random images."""
  settings = resolve(settings)
  check_required_flags(settings)
  if settings.deterministic:
    tf.config.experimental.enable_op_determinism()
  cluster = detect.from_environment()
  with _supervise(settings, cluster) as supervisor:
    preflight(settings, cluster, supervisor)
    with _lock_workdir(settings, cluster, supervisor):
      strategy = _form_strategy(settings, cluster, supervisor)
      run = functools.partial(
        train, strategy=strategy, cluster=cluster, supervisor=supervisor
      )
      if settings.dry_run:
        dry_run.dry_run(settings, strategy.num_replicas_in_sync, run=run)
      else:
        run(settings)


def check_required_flags(settings: TrainConfig) -> None:
  """Raises UsageError where a flag is missing that only a dry run does without."""
  for flag in ("data_dir", "workdir"):
    if not settings.dry_run and not getattr(settings, flag):
      raise errors.UsageError(f"--{flag} is required, unless with --dry_run.")


def _supervise(
  settings: TrainConfig, cluster: Cluster
) -> contextlib.AbstractContextManager[Supervisor]:
  """Waits for all workers, then watches them and the scheduler's signals."""
  return supervise(
    cluster,
    facts={"version": __version__, "config": manager.fingerprint(settings)},
    timeouts=Timeouts(
      start=settings.start_timeout,
      peer=settings.peer_timeout,
      step=settings.step_timeout,
    ),
    grace_seconds=settings.grace_seconds,
    heartbeat_file=settings.heartbeat_file,
  )


def preflight(settings: TrainConfig, cluster: Cluster, supervisor: Supervisor) -> None:
  """Runs the doctor's quick checks and logs each finding.

  A dry run has neither data nor workdir, so only its flags are checked. The checks run
  under the supervisor, so that every worker learns what one of them finds.

  Raises:
    errors.FacedistError: A check found what keeps this run from training.
  """
  supervisor.detector.note("checking flags, data and workdir")
  found = [cluster_checks.check_names(cluster), *cluster_checks.check_proxies(cluster)]
  if settings.dry_run:
    found.append(checks.check_flags(settings, cluster))
  else:
    found += checks.check_run(settings, cluster, is_quick=True)
  bad = checks.first_bad(found)
  for finding in found:
    if finding is not bad:  # its error is printed
      logging.info("%s", finding)
  if bad is not None:
    raise checks.error_of(bad)


@contextlib.contextmanager
def _lock_workdir(
  settings: TrainConfig, cluster: Cluster, supervisor: Supervisor
) -> Iterator[None]:
  """Has the chief hold the lock of the workdir while the body runs.

  A dry run needs none: its workdir is a temporary folder of its own.
  """
  with contextlib.ExitStack() as held:
    if cluster.is_chief and not settings.dry_run:
      lock = workdir_lock.held(
        str(settings.workdir),
        on_loss=supervisor.end,
        grace_seconds=settings.grace_seconds,
      )
      held.enter_context(lock)
    yield


def _form_strategy(
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
  *,
  strategy: tf.distribute.Strategy,
  cluster: Cluster,
  supervisor: Supervisor,
) -> None:
  """Builds the parts of a run from its config and trains to the end of the last phase.

  Raises:
    errors.ConfigError: The workdir holds a run with another config.
    errors.SavingError: Something that was to be written is missing from the workdir.
    errors.FacedistError: As `Trainer.run`.
  """
  workdir = str(settings.workdir)
  manager.claim_workdir(settings, workdir, is_chief=cluster.is_chief)

  supervisor.detector.note("opening the data")
  data = inputs.open_dataset(settings)
  train_reader = inputs.open_split(settings, data, "train")
  num_records = train_reader.num_records
  manifest = train_reader.manifest
  facts = manager.data_facts(manifest)
  phases = schedules.plan_phases(settings, num_records)
  trainer.log_run_header(settings, strategy, facts, phases, num_records=num_records)

  supervisor.detector.note("building the network")
  state = train_state.build_train_state(
    strategy,
    settings,
    image_size=manifest.image_size,
    num_identities=manifest.num_identities,
  )
  health = step_health.StepHealth()
  supervisor.watch_steps(
    health.count_arrivals,
    on_stop=None if settings.dry_run else health.request_stop,
  )
  monitor = step_health.HealthMonitor(
    health, supervisor.detector, strategies.local_replicas(strategy)
  )

  load_errors = pipeline.LoadErrors()
  with (
    data,
    load_errors.reraised(),
    monitor.together(strategy),
    uploader.open_uploader(
      workdir,
      is_chief=cluster.is_chief,
      keep_last=settings.keep_last,
      keep_every=settings.keep_every,
    ) as uploads,
  ):
    trainer.Trainer(
      state=state,
      strategy=strategy,
      phases=phases,
      settings=train_step.settings_of(settings),
      inputs=inputs.build_inputs(
        settings, strategy, cluster, data, train_reader, load_errors
      ),
      cadence=config.subset(trainer.Cadence, settings),
      checkpoint_manager=manager.CheckpointManager(
        state.checkpoint(),
        strategy,
        uploader=uploads,
        facts=facts,
        rows=state.rows,
        piece_rows=settings.head_shard_rows,
      ),
      monitor=monitor,
      uploader=uploads,
    ).run()
  uploads.check()


def run() -> None:
  """Runs the command line."""
  config.run_command(main, TrainConfig)


if __name__ == "__main__":
  run()
