"""Small folders of drawn images in VGGFace2's and LFW's layouts."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import pytest

from facedist import storage
from tfrecords_tools import build
from tfrecords_tools.builder import options

WIDTH, HEIGHT = 64, 80
LANDMARKS = ((22.0, 30.0), (42.0, 30.5), (32.0, 42.0), (24.0, 54.0), (41.0, 53.5))


def draw_image(seed: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
  """Returns smooth random colours, uint8[height, width, 3], BGR."""
  coarse = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
  return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg_of(image: np.ndarray) -> bytes:
  """Returns the image as a JPEG of quality 95."""
  return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def landmark_row(name: str, points: Sequence[Sequence[float]] = LANDMARKS) -> str:
  """Returns a line as VGGFace2's loose_landmark files have them."""
  numbers = (f"{value:.4f}" for point in points for value in point)
  return ",".join((f'"{name}"', *numbers))


LANDMARK_HEADER = "NAME_ID,P1X,P1Y,P2X,P2Y,P3X,P3Y,P4X,P4Y,P5X,P5Y"


@pytest.fixture
def vggface2_dir(tmp_path: pathlib.Path) -> pathlib.Path:
  """.../faces/train with 4, 3 and 1 images of three identities, and all the tables."""
  parent = tmp_path / "faces"
  names = [
    f"{identity}/{number:04d}_01"
    for identity, count in (("n000003", 4), ("n000001", 3), ("n000007", 1))
    for number in range(1, count + 1)
  ]
  for seed, name in enumerate(names):
    path = parent / "train" / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg_of(draw_image(seed)))
  rows = [LANDMARK_HEADER, *map(landmark_row, names)]
  (parent / "loose_landmark_train.csv").write_text("\n".join(rows) + "\n")
  (parent / "train_list.txt").write_text("".join(f"{name}.jpg\n" for name in names))
  (parent / "identity_meta.csv").write_text(
    "Class_ID, Name, Sample_Num, Flag, Gender\n"
    'n000001, "Ada_Lovelace", 3, 1, f\n'
    'n000003, "Anne,_Princess_Royal", 4, 1, f\n'
    'n000099, "Somebody_Else", 4, 1, f\n'
  )
  return parent / "train"


@pytest.fixture
def lfw_dir(tmp_path: pathlib.Path) -> pathlib.Path:
  """.../lfw/aligned with four people's aligned images, and pairs.txt beside it."""
  parent = tmp_path / "lfw"
  people = {"Al_Gore": 2, "Bo_Derek": 2, "Cher": 1, "Dido": 1}
  for seed, (name, number) in enumerate(
    (name, number) for name, count in people.items() for number in range(1, count + 1)
  ):
    path = parent / "aligned" / name / f"{name}_{number:04d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg_of(draw_image(seed, 112, 112)))
  (parent / "pairs.txt").write_text(
    "2\t1\nBo_Derek\t1\t2\nCher\t1\tDido\t1\nAl_Gore\t1\t2\nAl_Gore\t2\tBo_Derek\t1\n"
  )
  return parent / "aligned"


@pytest.fixture
def build_config(tmp_path: pathlib.Path) -> Callable[..., options.BuildConfig]:
  """Makes settings of the builder; a relative `output_dir` is below `tmp_path`."""

  def make(
    input_dir: pathlib.Path | str | None, *, output_dir: str = "shards", **changes: Any
  ) -> options.BuildConfig:
    if not storage.is_bucket(output_dir):
      output_dir = str(tmp_path / output_dir)
    values = {"dataset": "vggface2", "num_processes": 1, "num_shards": 2} | changes
    given = None if input_dir is None else str(input_dir)
    return options.BuildConfig(input_dir=given, output_dir=output_dir, **values)

  return make


@pytest.fixture
def build_set(build_config: Callable[..., options.BuildConfig]) -> Callable[..., str]:
  """Builds a set with the settings of `build_config`; returns its folder."""

  def make(input_dir: pathlib.Path | str | None, **changes: Any) -> str:
    settings = build_config(input_dir, **changes)
    build.main(settings)
    return settings.output_dir

  return make
