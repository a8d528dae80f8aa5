"""One worker of a cluster: runs every sharded head on a batch, writes an .npz."""

import sys

import numpy as np

from facedist.distributed import detect, strategies
from facedist.models.heads.margins import MARGINS
from tests.facedist.models import test_sharded_head


def main(path: str) -> None:
  """Writes this worker's part of the results: its samples and its rows' gradients."""
  strategy = strategies.make_strategy("multiworker", detect.from_environment())
  found: dict[str, np.ndarray] = {}
  for kind in MARGINS:
    batch = test_sharded_head.batch()
    result = test_sharded_head.sharded(strategy, kind, *batch, is_traced=False)
    parts = vars(result) | result.output
    del parts["output"]
    found |= {f"{kind}/{name}": value for name, value in parts.items()}
  np.savez(path, **found)


if __name__ == "__main__":
  main(sys.argv[1])
