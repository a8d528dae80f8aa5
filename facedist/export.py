"""Writes a run's network as a SavedModel for serving; every path may be gs://.

  python -m facedist.export --workdir=/runs/a --output=/models/faces/1

writes version 1 of a model for TensorFlow Serving with --model_base_path=/models/faces.
Any program that loads a SavedModel can use it, without facedist:

  model = tf.saved_model.load("/models/faces/1")
  model.signatures["serving_default"](images=pixels)["embeddings"]

Both signatures return embeddings, float32[batch, E], those of facedist.embed:

  serving_default   takes images, uint8[batch, S, S, 3], RGB, not scaled
  serving_encoded   takes image_bytes, string[batch], JPEG or PNG files of S x S pixels,
                    and turns them upright by their EXIF orientation

Faces are not detected: images must be aligned as the training images were. The file
assets.extra/facedist.json describes the model: model, checkpoint, step, weights,
weights_crc32c, embedding_size, image_size, normalized, mirrored, channels, policy,
data_fingerprint, alignment (the template; null if not known), signatures and
tool_version. Cosine thresholds of facedist.evaluate hold for models with --mirror,
which takes twice as long.

The folder appears under its name only after the model was loaded again and gave the
same embeddings as the run. An existing folder is never changed.
"""

import dataclasses
import json
import os
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from facedist import __version__, config, errors, storage
from facedist.config import setting
from facedist.distributed import strategies
from facedist.evaluation import evaluator, verification
from facedist.evaluation.embedder import Embedder
from facedist.models import serving
from facedist.training import inference
from facedist.training.checkpoint import checkpoints
from facedist.training.inference import EmbeddingSettings

FACTS_NAME = "assets.extra/facedist.json"
_PROBES = 4
_MIN_COSINE = 0.99  # fused kernels round otherwise in half precision


@dataclasses.dataclass(frozen=True)
class ExportConfig(EmbeddingSettings):
  """Which network is exported, and where to."""

  output: str = setting(
    heading="The SavedModel",
    help="Folder to create; if it exists, it must be empty.",
    path=True,
  )


def main(settings: ExportConfig) -> None:
  """Loads the network, writes the SavedModel beside its place and tries it there."""
  check_output(settings.output)
  strategies.share_gpus()
  checkpoint = evaluator.find_checkpoint(settings.workdir, settings.checkpoint)
  network = inference.load_network(
    settings.workdir, checkpoint, weights=settings.weights
  )
  facts = describe(settings, network, checkpoint)
  logging.info(
    "exporting %s, for images aligned by: %s",
    network.name,
    facts["alignment"] or "not known",
  )
  try:
    with storage.new_folder(settings.output, last=serving.MODEL_FILE) as folder:
      write_model(settings, network, folder)
      storage.write_bytes(
        os.path.join(folder, FACTS_NAME), (json.dumps(facts, indent=1) + "\n").encode()
      )
      try_model(settings, network, folder)
  except FileExistsError as error:
    raise errors.UsageError(
      f"--output={settings.output} was made by another process meanwhile; choose "
      "another folder."
    ) from error
  except OSError as error:
    raise errors.UsageError(
      f"--output={settings.output} cannot be written ({error.strerror or error}); "
      "choose another folder."
    ) from error
  logging.info("wrote %s", settings.output)


def check_output(output: str) -> None:
  """Raises UsageError where something is already, or where TensorFlow loads nothing."""
  if storage.is_pattern(output):
    raise errors.UsageError(
      f"--output={output} has one of * ? [ ] \\, which TensorFlow reads as a pattern "
      "when it loads a SavedModel; choose a name without."
    )
  name = output.rstrip("/")  # with the slash it may be a console's empty placeholder
  if os.path.isdir(name):  # the model is written beside it, then takes its name
    storage.check_folder(os.path.dirname(os.path.realpath(name)), flag="output")
  elif not os.path.isfile(name):
    storage.check_file(name, flag="output")
  names = storage.list_names(output)
  if names:
    raise errors.UsageError(
      f"--output={output} must be new or empty, but has {names[0]}; choose another "
      "folder, such as the next version's."
    )
  if storage.exists(name) and not os.path.isdir(name):
    raise errors.UsageError(
      f"--output={output} must be a folder, but a file has that name; choose another."
    )


def describe(
  settings: ExportConfig,
  network: inference.InferenceNetwork,
  checkpoint: checkpoints.Checkpoint,
) -> dict[str, Any]:
  """Returns the contents of the file beside the model."""
  marker = checkpoint.marker()
  facts = inference.network_facts(
    network, checkpoint, normalize=settings.normalize, mirror=settings.mirror
  )
  return facts | {
    "channels": "RGB",
    "policy": network.policy,
    "data_fingerprint": marker.get("data_fingerprint"),
    "alignment": marker.get("alignment"),  # older markers do not say
    "signatures": [serving.PIXELS_SIGNATURE, serving.ENCODED_SIGNATURE],
    "tool_version": __version__,
  }


def write_model(
  settings: ExportConfig, network: inference.InferenceNetwork, folder: str
) -> None:
  """Writes the SavedModel to a local folder.

  Raises:
    errors.DataError: TensorFlow cannot write it; the disk is full, most likely.
  """
  served = serving.ServedNetwork(
    network=network.embed,
    variables=network.variables,
    image_size=network.image_size,
    mirror=settings.mirror,
    normalize=settings.normalize,
  )
  try:
    served.save(folder)
  except tf.errors.OpError as error:
    reason = errors.first_line(error).rpartition("}} ")[2]
    raise errors.DataError(
      f"--output={settings.output} cannot be written ({reason}); free space on its "
      "disk or choose another folder."
    ) from error


def try_model(
  settings: ExportConfig, network: inference.InferenceNetwork, folder: str
) -> None:
  """Loads the written model and compares its embeddings with the network's.

  Raises:
    errors.DataError: The network embeds images as zero or as what is not finite.
    RuntimeError: The two differ.
  """
  side = network.image_size
  images = np.random.default_rng(0).integers(0, 256, (_PROBES, side, side, 3), np.uint8)
  embedder = Embedder(
    network=network.embed,
    network_name=network.name,
    batch_size=_PROBES,
    mirror=settings.mirror,
    normalize=settings.normalize,
  )
  expected = embedder.embed(images, [f"random image {n}" for n in range(_PROBES)])
  with storage.plain_name(folder) as plain:
    serve = tf.saved_model.load(plain).signatures[serving.PIXELS_SIGNATURE]
  found = serve(images=tf.constant(images))["embeddings"].numpy()
  first = np.arange(_PROBES)
  both = np.concatenate([expected, found])
  cosines = verification.cosine_scores(both, first, first + _PROBES)
  if not cosines.min() >= _MIN_COSINE:
    raise RuntimeError(
      f"the SavedModel of {network.name} embeds otherwise than the run's network: "
      f"cosine {cosines.min():.3f} for the same image"
    )


def run() -> None:
  """Runs the command line."""
  config.run_command(main, ExportConfig)


if __name__ == "__main__":
  run()
