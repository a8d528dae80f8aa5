"""Draws the target logit of every margin head against the angle.

  python -m benchmarks.head_curves --output=docs/images/head_curves.png

The curves are those of the default margins, before the scale, as docs/losses.md shows
them; the logit of another identity at the same angle is the dashed cosine.
"""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from facedist import config
from facedist.config import setting
from facedist.models.heads import margins
from facedist.models.heads.margins import (
  AdaFace,
  ArcFace,
  Combined,
  CosFace,
  CurricularFace,
  MagFace,
  SphereFace,
)

OWN_DEGREES = 60


@dataclasses.dataclass(frozen=True)
class CurvesConfig:
  """What is drawn."""

  output: str = setting(
    "docs/images/head_curves.png", help="PNG file to write.", path=True
  )


def plain_curves(target: tf.Tensor) -> dict[str, tf.Tensor]:
  """Returns the heads whose logit depends on the angle alone, by name."""
  factor, cosine, angle = SphereFace().angle_factor, CosFace().margin, ArcFace().margin
  three = Combined()
  m1, m2, m3 = three.angle_factor, three.angle_margin, three.cosine_margin
  return {
    "softmax": target,
    f"sphereface {factor}": margins.sphereface(target, angle_factor=factor),
    f"cosface {cosine}": margins.cosface(target, margin=cosine),
    f"arcface {angle} (also sub-centres)": margins.arcface(target, margin=angle),
    f"combined {m1:g}, {m2}, {m3}": margins.combined(
      target, angle_factor=m1, angle_margin=m2, cosine_margin=m3
    ),
  }


def adaptive_curves(target: tf.Tensor) -> dict[str, tf.Tensor]:
  """Returns the heads whose logit depends on the embedding's norm too, by name."""
  magface = MagFace()
  curves = {"softmax": target}
  for score, norm in ((-1.0, "small"), (0.0, "mean"), (1.0, "large")):
    curves[f"adaface, {norm} norm (score {score:g})"] = margins.adaface(
      target, norm_score=tf.fill(target.shape, score), margin=AdaFace().margin
    )
  norm_range = (magface.min_norm, magface.max_norm)
  for bound in norm_range:
    curves[f"magface, norm {bound:g}"] = margins.magface(
      target,
      norms=tf.fill(target.shape, bound),
      margins=(magface.min_margin, magface.max_margin),
      norm_range=norm_range,
    )
  return curves


def negative_curves(cosines: tf.Tensor) -> dict[str, tf.Tensor]:
  """Returns what CurricularFace makes of another identity's cosine, by t."""
  own = margins.arcface(
    tf.constant([math.cos(math.radians(OWN_DEGREES))]), margin=CurricularFace().margin
  )
  margined = tf.repeat(own, len(cosines))
  curves = {"all other heads": cosines}
  for curriculum in (0.0, 0.3, 0.6):
    curves[f"curricularface, t = {curriculum:g}"] = margins.curricularface_others(
      cosines[:, None], margined, curriculum=tf.constant(curriculum)
    )[:, 0]
  return curves


def draw(panels: dict[str, dict[str, np.ndarray]], output: str) -> None:
  """Draws a panel for each set of curves over angles from 0 to 180 degrees."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, row = pyplot.subplots(
    1, len(panels), figsize=(13, 4.6), dpi=100, layout="constrained"
  )
  for axes, (title, curves) in zip(row, panels.items(), strict=True):
    for number, (name, values) in enumerate(curves.items()):
      style = {"color": f"C{number - 1}"} if number else {"color": "grey", "ls": "--"}
      axes.plot(np.linspace(0, 180, len(values)), values, label=name, **style)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("angle between embedding and class weight, degrees")
    axes.set_xlim(0, 180)
    axes.set_xticks(range(0, 181, 30))
    axes.set_ylim(-1.9, 1.8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper right")
  row[0].set_ylabel("logit / scale")
  # No version in the file: the same curves give the same bytes.
  figure.savefig(output, metadata={"Software": None})
  pyplot.close(figure)


def main(settings: CurvesConfig) -> None:
  """Draws the picture."""
  target = tf.cos(tf.constant(np.linspace(0, np.pi, 721), tf.float32))
  panels = {
    "Target: by the angle alone": plain_curves(target),
    "Target: by the embedding's norm too": adaptive_curves(target),
    f"Another identity, the own class weight at {OWN_DEGREES}°": negative_curves(
      target
    ),
  }
  arrays = {
    title: {name: values.numpy() for name, values in curves.items()}
    for title, curves in panels.items()
  }
  draw(arrays, settings.output)


if __name__ == "__main__":
  config.run_command(main, CurvesConfig)
