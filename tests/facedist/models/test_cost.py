"""What backbones cost, against papers, the registry and the table of the docs."""

import functools
import math
import pathlib
import re

import pytest
import tensorflow as tf

from benchmarks import cost
from facedist.models import network
from facedist.models.backbones import registry

PAGE = pathlib.Path(__file__).parents[3] / "docs/models.md"


def network_of(name: str, image_size: int, embedding_size: int) -> list[tf.keras.Model]:
  built = network.build_network(
    backbone=name,
    image_size=image_size,
    embedding_size=embedding_size,
    policy="float32",
  )
  return [built.backbone, built.embedding]


@functools.cache
def costs_of(name: str, image_size: int, embedding_size: int = 512) -> tuple[int, int]:
  """Parameters and multiply-adds.

  Only the numbers are kept: the networks would fill a gigabyte.
  """
  models = network_of(name, image_size, embedding_size)
  return cost.parameters(*models), cost.multiply_adds(*models)


def test_costs_are_those_of_a_network_counted_by_hand():
  model = tf.keras.Sequential(
    [
      tf.keras.Input((8, 8, 3)),
      tf.keras.layers.Conv2D(4, 3, padding="same"),  # 64 places x 27 inputs x 4
      tf.keras.layers.BatchNormalization(),
      tf.keras.layers.DepthwiseConv2D(3, strides=2, use_bias=False),  # 9 places x 36
      tf.keras.layers.Flatten(),
      tf.keras.layers.Dense(5),  # 36 x 5
    ]
  )
  assert cost.multiply_adds(model) == 64 * 108 + 9 * 36 + 36 * 5
  assert cost.parameters(model) == (108 + 4) + (4 + 4) + 36 + (180 + 5)


# Open Model Zoo's face-recognition models, with iresnet50 as resnet50-arcface. It folds
# batch norm where it can and counts its work; of a network as small as MobileFaceNet,
# that is a larger part. Of iresnet18 we know no count of parameters elsewhere.
@pytest.mark.parametrize(
  ("name", "embedding_size", "millions", "gigaflops"),
  [
    ("iresnet34", 512, pytest.approx(34.129, rel=1e-3), pytest.approx(8.934, rel=3e-3)),
    (
      "iresnet50",
      512,
      pytest.approx(43.576, rel=1e-3),
      pytest.approx(12.637, rel=3e-3),
    ),
    (
      "iresnet100",
      512,
      pytest.approx(65.131, rel=1e-3),
      pytest.approx(24.209, rel=3e-3),
    ),
    (
      "mobilefacenet",
      128,
      pytest.approx(0.993, rel=0.02),
      pytest.approx(0.449, rel=0.02),
    ),
  ],
)
def test_backbones_cost_what_open_model_zoo_publishes(
  name: str, embedding_size: int, millions: object, gigaflops: object
):
  parameters, adds = costs_of(name, 112, embedding_size)
  assert parameters / 1e6 == millions
  assert 2 * adds / 1e9 == gigaflops


@pytest.mark.parametrize(
  ("name", "giga"), [("iresnet18", 2.6), ("iresnet50", 6.3), ("iresnet100", 12.1)]
)
def test_iresnets_make_the_multiply_adds_of_arcface_torch_s_readme(
  name: str, giga: float
):
  # its table "ViT For Face Recognition", rows r18, r50 and r100, column FLOPs
  assert round(costs_of(name, 112)[1] / 1e9, 1) == giga


def test_mobilefacenet_costs_what_its_paper_says():
  """0.99 M parameters with batch norm folded, 221 M MAdds (arXiv:1804.07573).

  Its abstract says less than a million; the abstract of SeesawFaceNets
  (arXiv:1908.09124), which is compared with it, has the 221 M.
  """
  models = network_of("mobilefacenet", 112, 128)
  # folded, a batch norm leaves its offset and no scale
  scales = sum(
    math.prod(weight.shape)
    for model in models
    for weight in model.weights
    if "gamma" in weight.name
  )
  assert round((cost.parameters(*models) - scales) / 1e6, 2) == 0.99
  assert round(cost.multiply_adds(*models) / 1e6) == 221


def test_resnet50_costs_what_its_paper_and_keras_say():
  backbone = network_of("resnet50", 224, 8)[0]
  assert backbone.count_params() == 23_587_712  # Keras applications, without its top
  # 3.8e9 in Table 1 of arXiv:1512.03385, two digits and rounded down
  assert cost.multiply_adds(backbone) == pytest.approx(3.8e9, rel=0.02)


def test_vgg8_costs_what_keras_arcface_s_layers_sum_up_to():
  """Convolutions with bias and batch norm at 28, 14 and 7 px; 3-D embeddings of 3x3x64.

  The first kernel reads three channels here and one there: 288 weights more.
  """
  grey = (9 * 16 + 16) + (9 * 256 + 16) + (9 * 512 + 32) + (9 * 1024 + 32)
  grey += (9 * 2048 + 64) + (9 * 4096 + 64) + 2 * 2 * (16 + 32 + 64)
  output = 2 * 64 + (576 * 3 + 3) + 2 * 3
  adds = 784 * 9 * (48 + 256) + 196 * 9 * (512 + 1024) + 49 * 9 * (2048 + 4096)
  assert costs_of("vgg8", 28, 3) == (grey + 288 + output, adds + 576 * 3)


@pytest.mark.parametrize("name", registry.BACKBONES)
def test_the_registry_and_the_table_of_the_docs_have_what_each_backbone_costs(
  name: str,
):
  # here and not in test_docs.py, since most of these networks are built and counted
  rows = re.findall(
    r"^\| `(\w+)` \| ([\d.]+) M \| ([\d.]+) ([GM]) at (\d+) px",
    PAGE.read_text(),
    re.MULTILINE,
  )
  assert sorted(row[0] for row in rows) == sorted(registry.BACKBONES)
  _, millions, adds, unit, size = next(row for row in rows if row[0] == name)
  parameters, count = costs_of(name, int(size))
  assert f"{parameters / 1e6:.1f}" == millions
  digits = len(adds.partition(".")[2])
  assert f"{count / {'G': 1e9, 'M': 1e6}[unit]:.{digits}f}" == adds
  at_112 = costs_of(name, 112)[0] / 1e6
  assert at_112 == pytest.approx(registry.BACKBONES[name].millions, rel=0.03)
