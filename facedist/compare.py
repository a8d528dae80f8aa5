"""Says whether two photos show the same person.

Evaluate the run first, so that it has thresholds, then name the two images:

  python -m facedist.evaluate --workdir=/runs/a --verification_data=/data/lfw_112 --once
  python -m facedist.compare A.jpg B.jpg --workdir=/runs/a

It prints one line, such as

  same: cosine 0.4127 >= threshold 0.2871 (at most 0.001 of the different pairs of lfw
  are accepted), step 1200

The threshold is the one that the evaluation of this checkpoint found for the false
accept rate --far: the row of /runs/a/metrics.jsonl with the same step, weights and
mirror. Faces, cameras or an alignment unlike those of that set have another rate.

  --far=1e-4          another rate; the set must have at least 1 / FAR different pairs
  --set_name=cfp_fp   the set to take it from, where the run was scored on several
  --threshold=0.3     a threshold of your own, whose rate is not known
  --json              prints an object: same, cosine, threshold, far, set, step, model,
                      and alignment: template, detector, face and the images that
                      were aligned; null if none was

In a photo, the face is found with the package mtcnn (pip install 'facedist[align]') or
OpenCV's YuNet (--yunet), as tfrecords_tools.align does it, and aligned to ArcFace's
template. Of several faces the largest is taken, or with --face=central the one closest
to the middle. A photo without a face is an error. Photos are turned upright by their
EXIF orientation. An image of exactly the network's size counts as aligned, and nothing
is looked for in it; with --noalign, images of other sizes are refused. The exit code is
0 for same and for different.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from absl import logging

from facedist import config, errors, storage
from facedist.config import setting
from facedist.data import decoding, face_detection
from facedist.data.face_detection import DetectorSettings
from facedist.evaluation import evaluator, score_log, verification
from facedist.evaluation.embedder import Embedder
from facedist.training import inference
from facedist.training.checkpoint import checkpoints


@dataclasses.dataclass(frozen=True)
class CompareConfig(DetectorSettings):
  """Which images are compared, with which network, and at which threshold."""

  first: str = setting(
    help="A photo or an aligned image; also the first word after compare.", path=True
  )
  second: str = setting(
    help="The image to compare it with; also the second word.", path=True
  )
  workdir: str = setting(help="Folder of the training run.", path=True)
  checkpoint: str | None = setting(None, help=inference.CHECKPOINT_HELP, path=True)
  weights: str = setting("auto", help=inference.WEIGHTS_HELP, choices=inference.WEIGHTS)
  mirror: bool = setting(
    True, help="Whether to embed image plus mirrored image, as evaluation does."
  )
  far: float = setting(
    1e-3,
    help="False accept rate whose threshold is used: a power of ten.",
    at_least=1e-6,
    at_most=0.1,
  )
  set_name: str | None = setting(
    None, help="Verification set of the threshold; needed if there are several."
  )
  threshold: float | None = setting(
    None,
    help="Lowest cosine of the same person, instead of --far.",
    at_least=-1.0,
    at_most=1.0,
  )
  align: bool = setting(
    True,
    help="Whether to find and align the face in an image that has not the network's "
    "size; otherwise it is refused.",
  )
  json: bool = setting(False, help="Whether to print a JSON object.")


@dataclasses.dataclass(frozen=True)
class Threshold:
  """The lowest cosine that is taken for the same person.

  Attributes:
    cosine: 2 where no cosine is.
    far: The limit of the false accept rate that it keeps; None if not known.
    set_name: The verification set that it keeps it on; None if not known.
  """

  cosine: float
  far: float | None = None
  set_name: str | None = None


def main(settings: CompareConfig) -> int:
  """Reads the images, finds the threshold, embeds both and prints the answer."""
  checkpoint = evaluator.find_checkpoint(settings.workdir, settings.checkpoint)
  image_size = int(checkpoint.marker()["image_size"])
  names = [settings.first, settings.second]
  pixels = [read_image(name) for name in names]
  threshold = find_threshold(settings, checkpoint)
  photos = [
    name
    for name, one in zip(names, pixels, strict=True)
    if one.shape[:2] != (image_size, image_size)
  ]
  finder = face_detection.load(settings) if photos and settings.align else None
  images = np.stack(
    [
      aligned(one, image_size, name=name, finder=finder)
      for name, one in zip(names, pixels, strict=True)
    ]
  )
  network = inference.load_network(
    settings.workdir, checkpoint, weights=settings.weights
  )
  embedder = Embedder(
    network=network.embed,
    network_name=network.name,
    batch_size=len(images),
    mirror=settings.mirror,
  )
  cosine = float(
    verification.cosine_scores(
      embedder.embed(images, names), np.array([0]), np.array([1])
    )[0]
  )
  found = {
    "same": cosine >= threshold.cosine,
    "cosine": cosine,
    "threshold": threshold.cosine,
    "far": threshold.far,
    "set": threshold.set_name,
    "step": checkpoint.step,
    "model": network.name,
    "alignment": {**finder.facts, "images": photos} if finder else None,
  }
  print(json.dumps(found) if settings.json else line(found), flush=True)
  return errors.ExitCode.DONE


def line(found: dict[str, Any]) -> str:
  """Returns the answer as a sentence."""
  says, sign = ("same", ">=") if found["same"] else ("different", "<")
  rate = "whose false accept rate is not known"
  if found["far"] is not None:
    rate = (
      f"at most {found['far']:g} of the different pairs of {found['set']} are accepted"
    )
  return (
    f"{says}: cosine {found['cosine']:.4f} {sign} threshold {found['threshold']:.4f} "
    f"({rate}), step {found['step']}"
  )


def read_image(path: str) -> np.ndarray:
  """Returns an image, upright: uint8[height, width, 3] BGR.

  Raises:
    errors.DataError: It cannot be read, or is no image.
  """
  content = storage.read_bytes(path)
  try:
    return decoding.decode(content)
  except errors.DataError as error:
    raise errors.DataError(f"{path}: {error}; give an image.") from error


def aligned(
  pixels: np.ndarray,
  image_size: int,
  *,
  name: str,
  finder: face_detection.FaceFinder | None,
) -> np.ndarray:
  """Returns the face of a photo, aligned; an image of the size as it is.

  Args:
    pixels: uint8[height, width, 3] BGR, upright.
    image_size: Height and width of the result in pixels.
    name: The image's path, for messages.
    finder: Finds the face; None refuses images of another size.

  Returns:
    uint8[image_size, image_size, 3] RGB.

  Raises:
    errors.DataError: No face was found, or there is no finder.
  """
  height, width = pixels.shape[:2]
  if (height, width) != (image_size, image_size):
    if finder is None:
      raise errors.DataError(
        f"{name} is {width} x {height} pixels, but the network takes aligned faces of "
        f"{image_size} x {image_size}, and with --noalign no face is looked for; align "
        "it as the training images were, or leave --noalign out."
      )
    try:
      pixels, count = finder.aligned(pixels, size=image_size)
    except face_detection.NoFaceError as error:
      raise errors.DataError(
        f"{name}: {error}; give a photo in which the face is larger and not covered."
      ) from error
    if count > 1:
      logging.warning(
        "%s: %d faces were found, and the one that --face=%s takes is compared",
        *(name, count, finder.facts["face"]),
      )
  return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def find_threshold(
  settings: CompareConfig, checkpoint: checkpoints.Checkpoint
) -> Threshold:
  """Returns --threshold, or that of --far in the run's metrics.jsonl.

  Raises:
    errors.UsageError: There are several sets and no --set_name, or none of its name,
      or --far is none of the set's.
    errors.DataError: The checkpoint was not evaluated, or by an older version.
  """
  if settings.threshold is not None:
    return Threshold(settings.threshold)
  path = storage.join(settings.workdir, score_log.SCORE_LOG_NAME)
  weights = inference.choose_weights(
    checkpoints.load_config(settings.workdir), settings.weights
  )
  wanted = (checkpoint.step, weights, settings.mirror)
  by_set = {
    row["set"]: row  # the last one of a set that was rebuilt
    for row in score_log.read_rows(path)
    if (row.get("step"), row.get("weights", "trained"), row.get("mirrored")) == wanted
  }
  if not by_set:
    raise errors.DataError(
      f"{path} has no score of step {checkpoint.step} with {weights} weights and "
      f"mirror={settings.mirror}; run python -m facedist.evaluate --workdir="
      f"{settings.workdir} --verification_data=DIR --once, or give --threshold."
    )
  if settings.set_name is None and len(by_set) > 1:
    raise errors.UsageError(
      f"{path} has scores on several sets; choose one with --set_name="
      f"{'|'.join(sorted(by_set))}."
    )
  name = settings.set_name or next(iter(by_set))
  points = config.lookup(by_set, name, "set_name").get("tar_at_far", ())
  if not all("threshold" in at for at in points) or not points:
    raise errors.DataError(
      f"{path} has no thresholds of {name}: it is of an older version, or the set has "
      "fewer than 10 different pairs; evaluate again in a copy of the run without "
      "metrics.jsonl, or give --threshold."
    )
  for at in points:
    if math.isclose(at["far"], settings.far, rel_tol=1e-6):
      return Threshold(at["threshold"], at["far"], name)
  raise errors.UsageError(
    f"--far={settings.far:g} is not a rate that {name} supports; choose one of "
    f"{', '.join(format(at['far'], 'g') for at in points)}."
  )


def with_images_as_flags(arguments: Sequence[str]) -> list[str]:
  """Turns `A.jpg B.jpg --flag` into `--first=A.jpg --second=B.jpg --flag`."""
  words = list(arguments)
  for place, flag in enumerate(("first", "second")):
    if len(words) > place and not words[place].startswith("-"):
      words[place] = f"--{flag}={words[place]}"
    else:
      break
  return words


def run() -> None:
  """Runs the command line."""
  sys.argv[1:] = with_images_as_flags(sys.argv[1:])
  config.run_command(main, CompareConfig)


if __name__ == "__main__":
  run()
