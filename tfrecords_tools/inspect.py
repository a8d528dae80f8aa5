"""Shows what a folder of shards contains, or how two folders differ.

  python -m tfrecords_tools.inspect /data/shards/vggface2 --pictures=shown

prints settings, splits, sizes in bytes and images per identity. It writes
histograms.png and contact_sheet.png to shown/: random images, and images of the
identities with the most and the fewest. Numbers come from the indexes only.

  python -m tfrecords_tools.inspect NEW --diff=OLD --report=diff.json

lists what differs: entries of the manifests, and images that were added or removed, or
that have another content (the CRC-32C of their JPEG), identity or split. Images are
joined by file name. Shards that both sets have are not read.
`--diff OLD NEW` means the same.

The exit code is 0; with --diff 8 if the two differ; and 4 if one is corrupt.
Folders, report and pictures may be in a bucket (gs://...). Memory does not grow with
the number of images; --diff needs about 100 bytes per image in --scratch_dir.

--report is a JSON object. Of one set: format "facedist-summary", format_version 1, the
printed numbers, and `identities`, a list of {identity, images}. Of two: format
"facedist-diff", format_version 2; `images`, a list of {filename, old, new}, where old
and new are null or {jpeg_crc32c, identity, split}; `same`; `counts`; and `changes`, a
list of {name, old, new} of the manifests' entries: settings by their names,
`identities.NAME` (the label), `identity_names.NAME`, `skipped.PATH`, `pairs`.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from facedist import config, storage
from facedist.data.shards import manifest
from tfrecords_tools import reports, verify
from tfrecords_tools.validation import diff, pictures, scan, stats

_RANDOM_IMAGES = 4 * pictures.COLUMNS
_LARGE_IDENTITIES = 4  # those with the most images, on the sheet
_TEXT_BINS = 12
_BAR_LETTERS = 40


@dataclasses.dataclass(frozen=True)
class InspectConfig:
  """The flags of this command."""

  data_dir: str = config.setting(
    help="Folder of shards; may be given without the flag, as the first argument.",
    path=True,
  )
  diff: str | None = config.setting(
    None,
    help="Another folder of shards, the older one: shows how the two differ.",
    path=True,
  )
  pictures: str | None = config.setting(
    None,
    help="Folder for histograms.png and contact_sheet.png, local or gs://.",
    path=True,
  )
  report: str | None = config.setting(
    None,
    help="JSON file for what is printed and for details, local or gs://.",
    path=True,
  )
  seed: int = config.setting(0, help="Selects the random images.", at_least=0)
  num_processes: int | None = config.setting(
    None,
    help="Processes of --diff; one for each core if not given.",
    at_least=1,
    at_most=1024,
  )
  scratch_dir: str | None = config.setting(
    None,
    help="Local folder for --diff, created if needed; the system's temporary folder if "
    "not given.",
    on_disk=True,
  )


def main(settings: InspectConfig) -> int:
  """Shows one set, or how two differ.

  Returns:
    The exit code.
  """
  storage.check_file(settings.report, flag="report")
  if settings.pictures is not None:
    storage.check_folder(settings.pictures, flag="pictures")
  if settings.diff is not None:
    return diff.show(
      settings.diff,
      settings.data_dir,
      report=settings.report,
      num_processes=settings.num_processes,
      scratch_dir=settings.scratch_dir,
    )
  made = manifest.load(settings.data_dir)
  found = stats.collect(settings.data_dir, made)
  summary = stats.summarize(made, found)
  print(text_of(settings.data_dir, summary, found))
  _report(settings, summary, made=made, found=found)
  if settings.pictures is not None:
    _draw(settings, settings.pictures, made=made, found=found)
  return 0


def text_of(folder: str, summary: dict[str, Any], found: stats.Statistics) -> str:
  """Returns what is printed of a set."""
  size, of_identity = summary["image_size"], summary["images_of_an_identity"]
  lines = [f"{folder}  ({summary['kind']}, fingerprint {summary['fingerprint']})", ""]
  lines += [f"  {name} = {value}" for name, value in summary["settings"].items()]
  lines += ["", f"  {'split':8}{'records':>14}{'shards':>8}{'bytes':>20}"]
  for name, split in summary["splits"].items():
    numbers = f"{split['records']:14,}{split['shards']:8,}{split['bytes']:20,}"
    lines.append(f"  {name:8}{numbers}")
  if summary["pairs"] is not None:
    pairs = summary["pairs"]
    lines.append(f"  {pairs['pairs']:,} pairs in {pairs['folds']} folds")
  quantiles = summary["jpeg_bytes"]["quantiles"].items()
  spread = ", ".join(f"{value:,} ({float(share):.0%})" for share, value in quantiles)
  lines += [
    "",
    f"  {size}x{size} pixels; JPEGs of {summary['jpeg_bytes']['mean']:,.0f} bytes on "
    f"average; up to {spread}",
    f"  {summary['skipped']:,} source images left out",
    "",
    f"  {summary['num_identities']:,} identities, "
    f"{summary['identities_without_images']:,} of them without images; others have "
    f"{of_identity['least']:,} to {of_identity['most']:,} images, median "
    f"{of_identity['median']:g}, mean {of_identity['mean']:.1f}",
    "",
    *_histogram(found.images),
  ]
  return "\n".join(lines)


def _histogram(images: np.ndarray) -> list[str]:
  """Returns the lines of a histogram of images by identity."""
  if not len(images):
    return []
  edges = stats.edges(images, _TEXT_BINS)
  counts, _ = np.histogram(images, edges)
  lines = [f"  {'images':>15}{'identities':>14}"]
  for low, high, count in zip(edges[:-1], edges[1:] - 1, counts, strict=True):
    bar = "█" * int(np.ceil(_BAR_LETTERS * count / counts.max()))
    span = f"{low:,}" if low == high else f"{low:,}-{high:,}"
    lines.append(f"  {span:>15}{count:14,}  {bar}".rstrip())
  return lines


def _report(
  settings: InspectConfig,
  summary: dict[str, Any],
  *,
  made: manifest.Manifest,
  found: stats.Statistics,
) -> None:
  """Writes the report, if one is asked for."""
  head = {"format": "facedist-summary", "format_version": 1}
  head |= {"data_dir": settings.data_dir}
  with reports.new_report(settings.report, head, name="identities") as report:
    for identity, images in zip(made.identities, found.images.tolist(), strict=True):
      report.add({"identity": identity, "images": images})
    report.close(summary)


def _draw(
  settings: InspectConfig,
  folder: str,
  *,
  made: manifest.Manifest,
  found: stats.Statistics,
) -> None:
  """Writes both pictures."""
  title = f"{made.dataset}: {found.num_images:,} images, {made.num_identities:,} people"
  histograms = storage.join(folder, "histograms.png")
  pictures.draw_histograms(histograms, title, found, image_size=made.image_size)
  sheet = storage.join(folder, "contact_sheet.png")
  sections = _sections(settings, made, found)
  pictures.draw_sheet(sheet, title, sections)
  logging.info("drew %s and %s", histograms, sheet)


def _sections(
  settings: InspectConfig,
  made: manifest.Manifest,
  found: stats.Statistics,
) -> list[pictures.Section]:
  """Reads what the contact sheet shows."""
  generator = np.random.default_rng(settings.seed)
  shown = min(_RANDOM_IMAGES, found.num_images)
  numbers = generator.choice(found.num_images, shown, replace=False)
  by_images = np.argsort(found.images, kind="stable")
  by_images = by_images[found.images[by_images] > 0]
  fewest = by_images[: 2 * pictures.COLUMNS].tolist()
  most = by_images[::-1][:_LARGE_IDENTITIES].tolist()
  at, of_label = scan.find_records(
    settings.data_dir,
    made,
    numbers=numbers.tolist(),
    labels={*fewest, *most},
    each=pictures.COLUMNS,
  )
  heading = f"{len(at)} at random (seed {settings.seed})"
  sections = [pictures.Section(heading, [_face(at[one], made) for one in at])]
  for label in most:
    name = made.identity_names.get(made.identities[label], "").replace("_", " ")
    identity = f"{made.identities[label]} {name}".rstrip()
    heading = f"most: {identity}, {_images(found, label)}"
    faces = [
      pictures.read_face(place, image_size=made.image_size, caption=None)
      for place in of_label[label]
    ]
    sections.append(pictures.Section(heading, faces))
  faces = [_face(of_label[label][0], made) for label in fewest]
  faces = [
    dataclasses.replace(face, captions=(face.captions[0], _images(found, label)))
    for face, label in zip(faces, fewest, strict=True)
  ]
  sections.append(pictures.Section("fewest: one image of each", faces))
  return sections


def _face(place: scan.RecordPlace, made: manifest.Manifest) -> pictures.PictureFace:
  """Reads a record; its first caption is the identity."""
  return pictures.read_face(
    place, image_size=made.image_size, caption=made.identities[place.label]
  )


def _images(found: stats.Statistics, label: int) -> str:
  """Returns how many images an identity has, in words."""
  count = int(found.images[label])
  return f"{count:,} {'image' if count == 1 else 'images'}"


def with_folders_as_flags(arguments: Sequence[str]) -> list[str]:
  """Turns `DIR` and `--diff OLD NEW` into flags with their names."""
  if (named := verify.with_folder_as_flag(arguments)) != list(arguments):
    return named  # the new folder comes first
  for place, argument in enumerate(named):
    flag, equals, _ = argument.lstrip("-").partition("=")
    after = place + (1 if equals else 2)
    if flag == "diff" and after < len(named) and not named[after].startswith("-"):
      return [*named[:after], f"--data_dir={named[after]}", *named[after + 1 :]]
  return named


def run() -> None:
  """Runs the command; the console script's entry."""
  sys.argv[1:] = with_folders_as_flags(sys.argv[1:])
  config.run_command(main, InspectConfig)


if __name__ == "__main__":
  run()
