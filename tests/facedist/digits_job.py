"""The base's own job as its users run it: from digits to a drawn sphere.

Not collected by itself: test_addons.py runs it, in a process where tensorflow_addons
cannot be imported.
"""

import dataclasses
import json
import pathlib

import cv2
import numpy as np
from absl import flags

from facedist import addons, config, embed, errors, evaluate, train
from facedist.data import noise
from facedist.data.shards import manifest
from facedist.training import metric_writer
from facedist.training.config import TrainConfig
from tfrecords_tools import build
from tfrecords_tools.builder import options

CONFIG = pathlib.Path(__file__).parents[2] / "configs/mnist_vgg8_arcface.flags"
SIZE = 16


def run_of(shards: str, workdir: str) -> TrainConfig:
  """The config, on fewer and smaller images and for fewer steps."""
  values = flags.FlagValues()
  config.define_flags(TrainConfig, values)
  flags.DEFINE_string("flagfile", "", "", flag_values=values)
  flags.DEFINE_string("undefok", "", "", flag_values=values)
  values(["train", f"--flagfile={CONFIG}"])
  return dataclasses.replace(
    config.from_flags(TrainConfig, values),
    data_dir=shards,
    workdir=workdir,
    global_batch=32,
    full_epochs=3.0,
    log_every_steps=10,
  )


def test_addons_cannot_be_imported_here():
  assert addons.get("lamb") is addons.Lamb


def test_digits_are_built_trained_scored_and_drawn(tmp_path: pathlib.Path):
  shards, workdir, pairs = (str(tmp_path / name) for name in ("digits", "run", "pairs"))
  build.main(
    options.BuildConfig(
      dataset="digits",
      output_dir=shards,
      image_size=SIZE,
      val_fraction=0.1,
      max_images_per_identity=30,
      num_processes=1,
    )
  )
  train.main(run_of(shards, workdir))
  losses = [loss for _, loss in metric_writer.step_losses(workdir)]
  assert len(losses) == 29  # 3 epochs of 300 images, 32 a step; the last step is whole
  assert np.mean(losses[-7:]) < np.mean(losses[:7])

  noise.write_noise_verification_set(
    pairs, num_pairs=4, folds=2, image_size=SIZE, seed=0
  )
  scoring = evaluate.EvaluateConfig(workdir, pairs, once=True)
  assert evaluate.main(scoring) == errors.ExitCode.DONE
  rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  assert json.loads(rows[-1])["step"] == 29

  picture, document = tmp_path / "sphere.png", tmp_path / "digits.json"
  drawing = embed.EmbedConfig(
    workdir=workdir,
    input=shards,
    output=str(document),
    split="val",
    plot=str(picture),
  )
  assert embed.main(drawing) == errors.ExitCode.DONE
  held_out = manifest.load(shards).split("val", shards).records
  embeddings = json.loads(document.read_text())["embeddings"]
  assert len(embeddings) == held_out
  assert {entry["identity"] for entry in embeddings} == set("0123456789")
  assert cv2.imread(str(picture)).shape == (530, 1000, 3)
