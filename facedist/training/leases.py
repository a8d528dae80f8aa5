"""Leases: while a reader needs checkpoints, training does not delete them."""

import json
import time
from collections.abc import Collection

from absl import logging

from facedist import errors, storage

LEASE_SECONDS = 600.0
FOLDER_NAME = "checkpoints/holds"


def hold(workdir: str, holder: str, steps: Collection[int]) -> None:
  """Keeps checkpoints from being deleted for LEASE_SECONDS; call again to renew.

  The lease says when it was renewed, since a bucket has no clock to ask: the clocks of
  holder and trainer may differ by minutes, not by more.

  Args:
    workdir: The run's folder.
    holder: A name for who holds, unique among readers.
    steps: Steps of all checkpoints that `holder` needs; none ends its hold.
  """
  path = storage.join(workdir, FOLDER_NAME, f"{holder}.json")
  if not steps:
    storage.remove(path)
    return
  lease = {"steps": sorted(steps), "renewed": time.time()}
  storage.write_bytes(path, json.dumps(lease).encode())


def held_steps(workdir: str) -> set[int]:
  """Returns the steps in all leases that have not run out."""
  folder = storage.join(workdir, FOLDER_NAME)
  steps: set[int] = set()
  for name in storage.list_names(folder):
    if not name.endswith(".json"):
      continue  # being written
    path = storage.join(folder, name)
    try:
      lease = json.loads(storage.read_bytes(path))
      if time.time() - lease["renewed"] < LEASE_SECONDS:
        steps.update(map(int, lease["steps"]))
    except errors.DataError:
      continue  # released between listing and reading
    except (ValueError, TypeError, KeyError):
      logging.warning("%s is no lease and holds nothing; remove it.", path)
  return steps
