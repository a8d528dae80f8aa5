"""Shows how far neighbours on disk are apart in training, for blocks of several sizes.

  python -m benchmarks.shuffle_distance --output=docs/images/shuffle_distance.png

Draws, for each order, the share of all pairs of neighbouring records that come within
so many samples of each other in an epoch, and prints what docs/reading.md says of it.
"""

import dataclasses

import numpy as np

from facedist import config
from facedist.config import setting
from facedist.data.samplers import block_sampler
from facedist.data.samplers.epoch_sampler import EpochSampler

GLOBAL_BATCH = 512
STREAMS = 64
WINDOW_BLOCKS = 4
BLOCKS = (1, 64, 256, 1024)


@dataclasses.dataclass(frozen=True)
class DistanceConfig:
  """What is drawn."""

  output: str = setting(
    "docs/images/shuffle_distance.png",
    help="PNG file to write.",
    path=True,
  )
  records: int = setting(1_000_000, help="Records of the set.", at_least=2)


def distances(order: EpochSampler) -> np.ndarray:
  """Returns int64[records - 1], how many samples lie between neighbours, sorted."""
  places = np.empty(order.num_records, np.int64)
  places[order.samples_at(np.arange(order.num_records)).records] = np.arange(
    order.num_records
  )
  return np.sort(np.abs(np.diff(places)))


def draw(curves: dict[str, np.ndarray], output: str) -> None:
  """Draws the cumulative distribution of each array of sorted distances."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=110, layout="constrained")
  for number, (name, values) in enumerate(curves.items()):
    upto = np.geomspace(1, values[-1], 800)
    shares = np.searchsorted(values, upto, side="right") / len(values)
    colour = "black" if not number else f"C{number - 1}"
    axes.plot(upto, shares, label=name, color=colour)
  axes.axvline(GLOBAL_BATCH, color="grey", linewidth=0.8, linestyle=":")
  axes.annotate(
    "one global batch",
    (GLOBAL_BATCH, 0.97),
    (-4, 0),
    color="grey",
    ha="right",
    textcoords="offset points",
    fontsize=8,
    va="top",
  )
  axes.set_xscale("log")
  axes.set_xlim(10, 1.5 * max(values[-1] for values in curves.values()))
  axes.set_ylim(0, 1.02)
  axes.set_xlabel("samples between two records that are neighbours on disk")
  axes.set_ylabel("share of all neighbours")
  axes.set_title("How far neighbours stay neighbours in an epoch", fontsize=11)
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.9))
  # No version in the file: the same data give the same bytes.
  figure.savefig(output, metadata={"Software": None})
  pyplot.close(figure)


def main(settings: DistanceConfig) -> None:
  """Draws the picture and prints a table."""
  curves = {}
  print(f"{'block':>6}{'median distance':>17}{'within a batch':>16}")
  for block in BLOCKS:
    order = block_sampler.make_block_sampler(
      settings.records,
      GLOBAL_BATCH,
      0,
      shuffle_block=block,
      streams=STREAMS,
      window_blocks=WINDOW_BLOCKS,
    )
    values = distances(order)
    name = "single records" if block == 1 else f"blocks of {block} records"
    curves[name] = values
    within = np.searchsorted(values, GLOBAL_BATCH) / len(values)
    print(f"{block:6d}{np.median(values):17.0f}{within:16.2%}")
  draw(curves, settings.output)


if __name__ == "__main__":
  config.run_command(main, DistanceConfig)
