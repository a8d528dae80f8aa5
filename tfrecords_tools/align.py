"""Finds the faces in photos and writes their landmarks, for shards of aligned images.

The input is what tfrecords_tools.build takes: a folder with a folder for each identity,
local or gs://, uncompressed tar files, or a list of paths (--input_list).

  python -m tfrecords_tools.align --input_dir=/data/photos --output_dir=/data/faces
  python -m tfrecords_tools.build --dataset=vggface2 --input_dir=/data/photos \\
    --landmarks=/data/faces/loose_landmark.csv --output_dir=/data/shards/photos

The first command writes into --output_dir:

  loose_landmark.csv  five landmarks of each image with a face, as VGGFace2 has them:
                      NAME_ID,P1X,P1Y,...,P5Y in pixels of the upright image
  loose_bb.csv        the face's box: NAME_ID,X,Y,W,H
  skipped.csv         path and reason of each image without a face, or unreadable
  align.json          the detector, the choice and the counts
  images/             with --save_images, the faces aligned to ArcFace's template, as
                      JPEGs like those in the builder's shards
  parts/              the work so far: a run that was killed, or that gets more images,
                      continues from it

Faces are found with the package mtcnn (pip install 'facedist[align]'), or with OpenCV's
YuNet, whose model file comes from OpenCV's model zoo:

  python -m tfrecords_tools.align --input_dir=/data/photos.tar \\
    --output_dir=/data/faces --yunet=/models/face_detection_yunet_2023mar.onnx

Of several faces in an image the largest is taken, or with --face=central the one
closest to its middle. Images are turned upright by their EXIF orientation, and large
ones are shrunk for the detector. Every core runs a detector of its own.

If images were skipped, because no face was found or they could not be read (--max_bad),
the command ends with exit code 5, and skipped.csv names each.

--compare_with=FILE measures the landmarks against a table that exists. align.json and
the log have: images, in both tables; median_pixels and p90_pixels, the distance in
pixels of the aligned image of 112 x 112, and its 90th percentile; not_found, the share
of the given images of that table in which no face was found; and only_found, the
images with a face that it does not have.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import IO, Any

from absl import logging

from facedist import config, errors, progress, storage
from facedist.data import alignment, face_detection, image_names
from tfrecords_tools import landmarks, parallel, reports
from tfrecords_tools.builder import state
from tfrecords_tools.sources import base, listing, tables

LANDMARKS_NAME = "loose_landmark.csv"
BOXES_NAME = "loose_bb.csv"
SKIPPED_NAME = "skipped.csv"
REPORT_NAME = "align.json"
SETTINGS_NAME = "settings.json"
_IMAGES_WORTH_A_PROCESS = 100  # below, starting one takes longer than the images


@dataclasses.dataclass(frozen=True)
class AlignConfig(face_detection.DetectorSettings):
  """The command's flags."""

  output_dir: str = config.setting(
    heading="Images and outputs",
    help="Folder for the tables, local or gs://.",
    path=True,
  )
  input_dir: str | None = config.setting(
    None,
    help="Folder of the identities' folders, local or gs://; or FILE.tar, or several "
    "with commas or a *.",
    paths=True,
  )
  input_list: str | None = config.setting(
    None,
    help="File of the images' paths, one per line, that end in identity/image: "
    "absolute, gs://, or relative to --input_dir.",
    path=True,
  )
  save_images: bool = config.setting(
    False, help="Whether to write the aligned images too."
  )
  image_size: int = config.setting(
    112,
    help="Height and width of an aligned image in pixels.",
    at_least=8,
    at_most=4096,
  )
  quality: int = config.setting(
    95, help="JPEG quality of the aligned images.", at_least=1, at_most=100
  )
  compare_with: str | None = config.setting(
    None, help="CSV of landmarks to measure the found ones against.", path=True
  )
  max_bad: int = config.setting(
    100, help="Images that may be unreadable before the command fails.", at_least=0
  )
  num_processes: int | None = config.setting(
    None, help="Processes; one for each core if not given.", at_least=1, at_most=1024
  )
  scratch_dir: str | None = config.setting(
    None,
    help="Local folder for sorting long lists and tar files' members; the system's "
    "temporary folder if not given.",
    on_disk=True,
  )


def main(settings: AlignConfig) -> errors.ExitCode:
  """Finds the faces part by part, then writes the tables of all of them.

  Returns:
    PARTIAL if images were skipped, else DONE.
  """
  storage.check_folder(settings.output_dir, flag="output_dir")
  if settings.scratch_dir:
    storage.check_folder(settings.scratch_dir, flag="scratch_dir")
  if settings.compare_with and not storage.exists(settings.compare_with):
    raise errors.UsageError(
      f"--compare_with={settings.compare_with} does not exist; check the path."
    )
  described = describe(settings)
  surveyed = survey(settings)
  begin(settings, described)
  remove_leftovers(settings)
  find_all(settings, surveyed)
  counts = write_tables(settings.output_dir, surveyed.num_parts)
  report: dict[str, Any] = {**described, **counts}
  if settings.compare_with:
    report["compared"] = landmarks.compare(
      storage.join(settings.output_dir, LANDMARKS_NAME),
      settings.compare_with,
      without=(
        tables.without_suffix(outcome.path)
        for outcome in outcomes_of(settings.output_dir, surveyed.num_parts)
        if outcome.landmarks is None or outcome.box is None
      ),
    )
    logging.info(
      "compared with %s: %s",
      settings.compare_with,
      ", ".join(f"{name} {value}" for name, value in report["compared"].items()),
    )
  content = json.dumps(report, indent=1) + "\n"
  storage.write_bytes(storage.join(settings.output_dir, REPORT_NAME), content.encode())
  logging.info(
    "wrote %s: %s images with a face, %s without, %s unreadable",
    settings.output_dir,
    *(f"{counts[name]:,}" for name in ("found", "not_found", "unreadable")),
  )
  skipped = counts["not_found"] + counts["unreadable"]
  return errors.ExitCode.PARTIAL if skipped else errors.ExitCode.DONE


def describe(settings: AlignConfig) -> dict[str, Any]:
  """Returns what decides the results: all parts of a folder must agree on it.

  Raises:
    errors.UsageError: The package mtcnn is needed, but not installed.
  """
  aligned = {"image_size": settings.image_size, "quality": settings.quality}
  return {
    "template": "arcface",
    "detector": face_detection.detector_name(settings),
    "face": settings.face,
    "aligned_images": aligned if settings.save_images else None,
  }


def begin(settings: AlignConfig, described: dict[str, Any]) -> None:
  """Writes the settings beside the parts, or checks that the folder has the same.

  Raises:
    errors.ConfigError: Its parts were made with other settings.
  """
  path = storage.join(parts_folder(settings), SETTINGS_NAME)
  content = (json.dumps(described, indent=1) + "\n").encode()
  if storage.write_bytes(path, content, if_absent=True):
    return
  before = storage.read_bytes(path)
  if before != content:
    raise errors.ConfigError(
      f"--output_dir={settings.output_dir} was begun with other settings, see {path}; "
      "give the same flags, or another folder."
    )


def remove_leftovers(settings: AlignConfig) -> None:
  """Removes the partial files of runs that were killed."""
  images = storage.join(settings.output_dir, landmarks.IMAGES_FOLDER)
  identities = [] if storage.is_bucket(images) else storage.list_names(images)
  folders = [storage.join(images, identity) for identity in identities]
  state.remove_leftovers((settings.output_dir, parts_folder(settings), *folders))


def open_source(settings: AlignConfig) -> base.Source:
  """Returns the images that the flags name; its groups can be iterated once."""
  return listing.list_images(
    settings.input_dir,
    input_list=settings.input_list,
    scratch_dir=settings.scratch_dir,
  )


def survey(settings: AlignConfig) -> landmarks.Survey:
  """Counts the images, those already done too, and logs what is left out.

  Raises:
    errors.DataError: There are none, or two have one name but for their endings.
  """
  source = open_source(settings)
  found = landmarks.survey(landmarks.parts_of(source), parts_folder(settings))
  logging.info("%s images in %s", f"{found.num_images:,}", source.folder)
  if source.left_out:
    logging.warning("left out: %s", image_names.described(source.left_out))
  if found.num_done:
    logging.info("continuing: %s images are done", f"{found.num_done:,}")
  return found


def find_all(settings: AlignConfig, surveyed: landmarks.Survey) -> None:
  """Finds the faces of the images whose parts are not finished.

  Raises:
    errors.DataError: More images are unreadable than --max_bad.
  """
  remaining = surveyed.num_images - surveyed.num_done
  if not remaining:
    return
  images_dir = storage.join(settings.output_dir, landmarks.IMAGES_FOLDER)
  found = landmarks.find_in_parts(
    landmarks.parts_of(open_source(settings)),
    folder=parts_folder(settings),
    finished=surveyed.finished,
    settings=landmarks.FindSettings(
      face_detection.DetectorSettings(yunet=settings.yunet, face=settings.face),
      images_dir if settings.save_images else None,
      alignment.FaceSettings(settings.image_size, settings.quality, 0.0),
    ),
    num_processes=settings.num_processes
    or min(parallel.available_cores(), 1 + remaining // _IMAGES_WORTH_A_PROCESS),
  )
  num_bad = surveyed.num_unreadable
  shown = progress.Progress(
    "aligned", total=surveyed.num_images, done=surveyed.num_done
  )
  with contextlib.closing(found), shown:
    for outcomes in found:
      for outcome in outcomes:
        if outcome.is_readable:
          continue
        num_bad += 1
        logging.warning("skipped %s: %s", outcome.path, outcome.reason)
        if num_bad > settings.max_bad:
          raise errors.DataError(
            f"{outcome.path}: {outcome.reason}. It is unreadable image number "
            f"{num_bad}, and {settings.max_bad} may be; repair the images, or raise "
            "--max_bad, and start again to continue."
          )
      shown.advance(len(outcomes))
    logging.info("%s", shown.line())


def write_tables(output_dir: str, num_parts: int) -> dict[str, int]:
  """Writes the tables of all parts; returns how many images were found, and not."""
  counts = dict.fromkeys(("found", "not_found", "unreadable", "several_faces"), 0)
  points = ",".join(f"P{number}{axis}" for number in range(1, 6) for axis in "XY")
  with contextlib.ExitStack() as stack:

    def new_table(name: str, header: str) -> IO[str]:
      stream = stack.enter_context(reports.new_text(storage.join(output_dir, name)))
      stream.write(f"{header}\n")
      return stream

    rows = new_table(LANDMARKS_NAME, f"NAME_ID,{points}")
    boxes = new_table(BOXES_NAME, "NAME_ID,X,Y,W,H")
    skipped = new_table(SKIPPED_NAME, "path,reason")
    for outcome in outcomes_of(output_dir, num_parts):
      stem = quoted(tables.without_suffix(outcome.path))
      if outcome.landmarks is None or outcome.box is None:
        counts["not_found" if outcome.is_readable else "unreadable"] += 1
        skipped.write(f"{quoted(outcome.path)},{quoted(str(outcome.reason))}\n")
        continue
      counts["found"] += 1
      counts["several_faces"] += outcome.num_faces > 1
      rows.write(",".join((stem, *(f"{x:.4f}" for x in outcome.landmarks))) + "\n")
      boxes.write(",".join((stem, *map(str, outcome.box))) + "\n")
  return counts


def outcomes_of(output_dir: str, num_parts: int) -> Iterator[landmarks.Outcome]:
  """Yields what was found in each image of all parts, in their order."""
  folder = storage.join(output_dir, landmarks.PARTS_FOLDER)
  for number in range(num_parts):
    yield from landmarks.read_part(storage.join(folder, landmarks.part_name(number)))


def quoted(text: str) -> str:
  """Returns a text as a cell of a CSV file."""
  return '"{}"'.format(text.replace('"', '""'))


def parts_folder(settings: AlignConfig) -> str:
  """Returns the folder of the parts."""
  return storage.join(settings.output_dir, landmarks.PARTS_FOLDER)


def run() -> None:
  """Runs the command; the console script's entry."""
  os.environ.update(landmarks.ONE_THREAD)  # before anything imports TensorFlow
  config.run_command(main, AlignConfig)


if __name__ == "__main__":
  run()
