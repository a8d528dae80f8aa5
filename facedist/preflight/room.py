"""Whether the disk of the workdir has room for a run's checkpoints."""

import shutil
from collections.abc import Iterator

from facedist import config, errors, storage
from facedist.data import manifest
from facedist.models import backbones
from facedist.preflight import findings
from facedist.preflight.findings import BAD, WARNING, Finding
from facedist.training import checkpoints
from facedist.training.checkpoints import Checkpoint
from facedist.training.config import TrainConfig, with_usual_values
from facedist.training.head_settings import NO_HEAD
from facedist.training.optimizer_settings import SLOTS

_FLOAT_BYTES = 4


def check_room(settings: TrainConfig, *, is_quick: bool) -> Iterator[Finding]:
  """Yields whether checkpoints have room; nothing where that cannot be known.

  A save without room fails and training goes on, so a run that has checkpoints is
  never kept from going on, and no run at its start: that is a warning.

  Args:
    settings: The run's.
    is_quick: Whether this is the start of a run.
  """
  workdir = settings.workdir
  if not workdir or storage.is_bucket(workdir):
    return
  try:
    free = shutil.disk_usage(workdir).free
    found = checkpoints.list_checkpoints(workdir)
    size = saved_bytes(found[-1]) if found else expected_bytes(settings)
  except (OSError, errors.FacedistError):  # which is another check's finding
    return
  count = max(1, settings.keep_last + 1 - len(found))
  text = (
    f"{workdir} has {_shown(free)} left, and {count} more checkpoints of "
    f"{_shown(size)} want {_shown(count * size)}"
  )
  if free >= count * size:
    yield findings.good("room", text)
    return
  state = WARNING if found or is_quick else BAD
  mend = "make room, lower --keep_last, or choose another --workdir"
  yield Finding("room", state, text, mend)


def saved_bytes(checkpoint: Checkpoint) -> int:
  """Returns what a checkpoint's files take, a sharded head's rows among them."""
  marker = checkpoint.marker()
  files = [*marker["files"].values(), *marker.get("rows", {}).get("files", {}).values()]
  return sum(int(file.get("bytes", 0)) for file in files)


def expected_bytes(settings: TrainConfig) -> int:
  """Returns about what a new run's checkpoint will take: weights, slots, averages.

  The same for a sharded head, whose rows lie beside TensorFlow's files.

  Raises:
    errors.FacedistError: The flags are wrong, or there is no manifest.
  """
  filled = with_usual_values(settings)
  backbone = config.lookup(backbones.BACKBONES, filled.backbone, "backbone")
  copies = 1 + SLOTS[filled.optimizer]
  network = round(1e6 * backbone.millions)
  floats = network * (copies + bool(filled.ema_decay))
  if filled.head != NO_HEAD:
    identities = manifest.load(str(filled.data_dir)).num_identities
    row = filled.embedding_size * (filled.sub_centres or 1)
    floats += identities * row * copies
  return _FLOAT_BYTES * floats


def _shown(size: int) -> str:
  """Returns bytes as text."""
  return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
