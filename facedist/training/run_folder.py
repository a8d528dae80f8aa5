"""A run's workdir: claimed by one config, which a second start must not contradict."""

import dataclasses
import json
from typing import Any

from facedist import config, errors, storage
from facedist.data import manifest
from facedist.training import checkpoints
from facedist.training.config import TrainConfig

CONFIG_NAME = "config.json"


def claim(settings: TrainConfig, workdir: str, *, is_chief: bool) -> None:
  """Writes workdir/config.json, or checks that it says the same.

  Raises:
    errors.ConfigError: A run with another config is there.
    errors.UsageError: The folder cannot be made or written.
    errors.DataError: The bucket cannot be read or written.
  """
  path = storage.join(workdir, CONFIG_NAME)
  check_config(settings, workdir)
  if not is_chief:
    return
  storage.check_folder(workdir, flag="workdir")
  storage.write_bytes(path, config.to_json(settings).encode())


def check_config(settings: TrainConfig, workdir: str) -> bool:
  """Compares a run's flags with those that its workdir was claimed with.

  Returns:
    Whether there is a run in the workdir.

  Raises:
    errors.ConfigError: One with another config; the text names the differing fields.
  """
  if not storage.exists(storage.join(workdir, CONFIG_NAME)):
    return False
  if differing := config.conflicts(checkpoints.load_config(workdir), settings):
    raise errors.ConfigError(
      f"--workdir={workdir} holds a run with another config ({'; '.join(differing)}); "
      "give the same flags or a new --workdir."
    )
  return True


def check_data(checkpoint: checkpoints.Checkpoint, data_fingerprint: str) -> None:
  """Raises DataError if the checkpoint was trained on other data."""
  saved = checkpoint.marker().get("data_fingerprint")
  if saved != data_fingerprint:
    raise errors.DataError(
      f"{checkpoint.path} was trained on data {saved}, not on these "
      f"({data_fingerprint}); give the same --data_dir or a new --workdir."
    )


def facts(content: manifest.Manifest) -> dict[str, Any]:
  """Returns what a checkpoint's marker says of the data."""
  return {
    "image_size": content.image_size,
    "num_identities": content.num_identities,
    "data_fingerprint": content.fingerprint,
    "alignment": content.aligned_by,
  }


def fingerprint(settings: TrainConfig) -> str:
  """Returns eight hex digits that change with any field that may not change."""
  fixed = {
    field.name: getattr(settings, field.name)
    for field in dataclasses.fields(settings)
    if not field.metadata["may_change"]
  }
  text = json.dumps(fixed, sort_keys=True)
  return f"{storage.crc32c_of(text.encode()):08x}"
