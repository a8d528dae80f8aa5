"""How gradients travel between workers: what sums them, and how many at a time."""

from typing import TypeAlias

import tensorflow as tf

from facedist import config

CommunicationOptions: TypeAlias = tf.distribute.experimental.CommunicationOptions

COMMUNICATIONS = {"auto": "AUTO", "ring": "RING", "nccl": "NCCL"}
USUAL_PACK_MB = {"NCCL": 25.0, "RING": 4.0}
"""Gradients that travel together, so that the last layers' are on their way while the
first layers' are computed. NCCL's is the default of PyTorch's DDP, which does the same
(arXiv:2006.15704); over gRPC on a CPU, packs that fit a core's cache were fastest."""


def collectives(communication: str) -> str:
  """Returns what `--communication` comes to on this machine: NCCL or RING."""
  chosen = config.lookup(COMMUNICATIONS, communication, "communication")
  if chosen != "AUTO":
    return chosen
  # TensorFlow's own AUTO does not choose NCCL wherever it can.
  return "NCCL" if tf.config.list_physical_devices("GPU") else "RING"


def communication_options(
  communication: str, pack_mb: float | None
) -> CommunicationOptions:
  """Returns how multiworker's gradients travel; see `make_strategy`."""
  chosen = collectives(communication)
  megabytes = USUAL_PACK_MB[chosen] if pack_mb is None else pack_mb
  return CommunicationOptions(
    bytes_per_pack=round(megabytes * 1e6),
    implementation=tf.distribute.experimental.CommunicationImplementation[chosen],
  )
