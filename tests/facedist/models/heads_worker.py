"""One worker of a cluster: judges a batch with every sharded head, writes an .npz."""

import sys

import numpy as np

from facedist.distributed import detect, strategies
from facedist.models.heads.margins import MARGINS
from tests.facedist.models import test_sharded_head


def main(path: str) -> None:
  """Writes what this worker knows: its part of the batch, its rows' gradients."""
  strategy = strategies.make_strategy("multiworker", detect.from_environment())
  found: dict[str, np.ndarray] = {}
  for kind in MARGINS:
    batch = test_sharded_head.batch()
    judged = test_sharded_head.sharded(strategy, kind, *batch, is_traced=False)
    parts = vars(judged) | judged.verdict
    del parts["verdict"]
    found |= {f"{kind}/{name}": value for name, value in parts.items()}
  np.savez(path, **found)


if __name__ == "__main__":
  main(sys.argv[1])
