import pathlib

import pytest

from benchmarks import head_curves
from facedist.models.heads.margins import MARGINS


def test_every_head_is_drawn_and_the_same_curves_give_the_same_picture(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  drawn: dict[str, None] = {}
  draw = head_curves.draw

  def note(panels: dict, output: str) -> None:
    drawn.update(dict.fromkeys(name for curves in panels.values() for name in curves))
    draw(panels, output)

  monkeypatch.setattr(head_curves, "draw", note)
  for name in ("one.png", "two.png"):
    head_curves.main(head_curves.CurvesConfig(output=str(tmp_path / name)))
  assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
  shown = " ".join(drawn)
  assert [head for head in MARGINS if head.split("_")[0] not in shown] == [
    "subcentre_arcface"  # its curve is arcface's
  ]
