import pathlib

import tensorflow as tf

from benchmarks import head_curves
from facedist.models.heads.margins import MARGINS


def test_every_head_has_a_curve():
  target = tf.linspace(-1.0, 1.0, 9)
  shown = " ".join(
    name
    for curves in (
      head_curves.plain_curves,
      head_curves.adaptive_curves,
      head_curves.negative_curves,
    )
    for name in curves(target)
  )
  assert [head for head in MARGINS if head.split("_")[0] not in shown] == [
    "subcentre_arcface"  # its curve is arcface's
  ]


def test_the_same_curves_give_the_same_picture(tmp_path: pathlib.Path):
  for name in ("one.png", "two.png"):
    head_curves.main(head_curves.CurvesConfig(output=str(tmp_path / name)))
  assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
