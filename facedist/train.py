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

from facedist import __version__, cluster, config, errors, strategies
from facedist.data import pipeline
from facedist.peers.patience import Patience
from facedist.preflight import cluster_checks, findings, run_checks
from facedist.training import (
  course,
  guard,
  inputs,
  introduction,
  outbox,
  phases,
  rehearsal,
  run_folder,
  saving,
  state,
  step_settings,
  trainer,
  vitals,
  watch,
  workdir_lock,
)
from facedist.training.config import TrainConfig, with_usual_values


def main(settings: TrainConfig) -> None:
  """Joins the cluster, then trains or rehearses."""
  settings = with_usual_values(settings)
  if settings.deterministic:
    tf.config.experimental.enable_op_determinism()
  crew = cluster.from_environment()
  if not settings.dry_run:
    _required(settings.data_dir, "data_dir")
    _required(settings.workdir, "workdir")
  with guard.standing(
    crew,
    facts={"version": __version__, "config": run_folder.fingerprint(settings)},
    patience=_patience(settings),
    grace_seconds=settings.grace_seconds,
    heartbeat_file=settings.heartbeat_file,
  ) as standing:
    # here, so that all hear of what one finds
    standing.lookout.note("checking flags, data and workdir")
    examine(settings, crew)
    if not settings.dry_run:
      with _workdir(settings, crew, standing):
        train(settings, _join(settings, crew, standing), crew, standing)
      return
    strategy = _join(settings, crew, standing)
    with rehearsal.stage_set(settings, strategy.num_replicas_in_sync) as acts:
      for act in acts:
        run_folder.claim(act, str(act.workdir), is_chief=crew.is_chief)
        train(act, strategy, crew, standing)
      rehearsal.score(str(acts[-1].workdir))


def examine(settings: TrainConfig, crew: cluster.Cluster) -> None:
  """Runs the doctor's quick checks: each finding is a line of the log.

  A dry run has neither data nor workdir, so its flags alone are checked: those given,
  before the rehearsal cuts them down.

  Raises:
    errors.FacedistError: A check found what keeps this run from training.
  """
  found = [cluster_checks.check_names(crew), *cluster_checks.check_proxies(crew)]
  if settings.dry_run:
    found.append(run_checks.check_flags(settings, crew))
  else:
    found += run_checks.check_run(settings, crew, is_quick=True)
  for finding in found:
    logging.info("%s", finding)
  findings.raise_for(found)


@contextlib.contextmanager
def _workdir(
  settings: TrainConfig, crew: cluster.Cluster, standing: guard.Guard
) -> Iterator[None]:
  """Has the run's workdir to itself while the body runs, from the first write on."""
  workdir = str(settings.workdir)
  with contextlib.ExitStack() as held:
    if crew.is_chief:
      lock = workdir_lock.held(
        workdir, on_loss=standing.end, grace_seconds=settings.grace_seconds
      )
      held.enter_context(lock)
    run_folder.claim(settings, workdir, is_chief=crew.is_chief)
    yield


def _join(
  settings: TrainConfig, crew: cluster.Cluster, standing: guard.Guard
) -> tf.distribute.Strategy:
  """Waits for all workers and forms the strategy with them."""
  with standing.forming():
    strategy = strategies.make_strategy(
      settings.strategy,
      crew,
      communication=settings.communication,
      pack_mb=settings.all_reduce_mb,
      peer_timeout=settings.peer_timeout,
    )
  logging.info("%s", strategies.describe(strategy, crew))
  return strategy


def train(
  settings: TrainConfig,
  strategy: tf.distribute.Strategy,
  crew: cluster.Cluster,
  standing: guard.Guard,
) -> None:
  """Builds the parts from the config and trains to the end of the last phase."""
  standing.lookout.note("bringing the data")
  data = inputs.open_set(settings)
  train_reader = inputs.open_split(settings, data, "train")
  manifest = train_reader.manifest
  plan = phases.plan(settings, train_reader.num_records)
  facts = run_folder.facts(manifest)
  introduction.introduce(
    settings, strategy, facts, plan, num_records=train_reader.num_records
  )
  standing.lookout.note("building the network")
  train_state = state.build_in(
    strategy,
    settings,
    image_size=manifest.image_size,
    num_identities=manifest.num_identities,
  )
  with data, _open_run(settings, strategy, standing) as (overseer, box):
    batches = inputs.build(settings, strategy, crew, data, train_reader)
    saver = _saver(settings, strategy, train_state=train_state, box=box, facts=facts)
    trainer.Trainer(
      state=train_state,
      strategy=strategy,
      phases=plan,
      settings=step_settings.settings_of(settings),
      inputs=batches,
      cadence=config.subset(trainer.Cadence, settings),
      course=course.Course(saver, overseer, batches.damage_limit),
      watch=overseer,
      outbox=box,
    ).run()
  box.check()


def _saver(
  settings: TrainConfig,
  strategy: tf.distribute.Strategy,
  *,
  train_state: state.TrainState,
  box: outbox.Outbox,
  facts: Mapping[str, Any],
) -> saving.Saver:
  """Returns what saves and restores the state."""
  return saving.Saver(
    train_state.checkpoint(),
    strategy,
    outbox=box,
    facts=facts,
    rows=train_state.rows,
    piece_rows=settings.head_shard_rows,
  )


@contextlib.contextmanager
def _open_run(
  settings: TrainConfig, strategy: tf.distribute.Strategy, standing: guard.Guard
) -> Iterator[tuple[watch.Watch, outbox.Outbox]]:
  """Yields what oversees the run and where it writes; leaves when all workers do."""
  own = vitals.Vitals()
  standing.interruption.arm(own.request_stop)
  standing.lookout.guard(own.count_arrivals)
  overseer = watch.Watch(own, standing.lookout, strategies.local_replicas(strategy))
  with (
    pipeline.data_errors(),
    overseer.together(strategy),
    outbox.opened(
      str(settings.workdir),
      is_chief=overseer.is_chief,
      keep_last=settings.keep_last,
      keep_every=settings.keep_every,
    ) as box,
  ):
    yield overseer, box


def _patience(settings: TrainConfig) -> Patience:
  """Returns how long this run waits for what."""
  return Patience(
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
