"""Writes the embeddings of images as JSON, .npz or Parquet; every path may be gs://.

The input is a folder of aligned images, a list of them, or a folder of shards (with
manifest.json):

  python -m facedist.embed --workdir=/runs/a --input=/data/faces --output=faces.json
  python -m facedist.embed --workdir=/runs/a --input=faces.txt --output=faces.json
  python -m facedist.embed --workdir=/runs/a --input=/data/vggface2_112 --split=val \\
    --output=val.json

A list has a line for each image: its path, absolute, gs://, or relative to the list's
folder; and, after a tab, its identity, which is the image's folder if not given.

Embeddings of two or three floats can be drawn, with one colour per identity:

  python -m facedist.embed --workdir=/runs/digits --input=/data/digits --split=val \\
    --output=digits.json --plot=digits.png

Several GPUs and machines share the images:

  --strategy=mirrored      every GPU of this machine takes its part of each batch
  --strategy=multiworker   the workers that TF_CONFIG, Slurm or Kubernetes describe take
                           a part of the images each, on all of their GPUs; the first
                           writes --output, which must be on a disk that all share, or
                           in a bucket

The suffix of --output decides its format:

  .json     one object: facts of what made it (model, checkpoint, step, weights,
            weights_crc32c, embedding_size, image_size, normalized, mirrored), then
            "embeddings", a list of {"path", "identity", "embedding"}, then "skipped",
            a list of {"path", "reason"}
  .jsonl    JSON Lines: {"facts": {...}}, then an image a line, embedded or skipped
  .npz      NumPy arrays, no pickle: embeddings (float32[images, embedding_size]),
            paths, identities, skipped_paths, skipped_reasons, skipped_places (the
            embeddings before each), and facts as JSON
  .parquet  columns path, identity and embedding, with facts and skipped as JSON in the
            file's metadata; needs pip install 'facedist[parquet]'

An identity is the name of the image's parent folder, or what the record says.

Images are found in all folders below --input, in sorted order: jpg, jpeg, jpe, jfif,
png, bmp, webp, tif, jp2 and a few more, in any case (docs/data.md). Hidden and system
folders and files of other endings are left out; their counts are logged, and are in the
output as "left_out". Images are turned upright by their EXIF orientation. They must be
aligned as the training images were: without --align no face is looked for, and an image
of another size is cut to the largest square in its middle and resized. An image that
cannot be read is named and skipped, and the exit code is 5. Cosine thresholds of
facedist.evaluate hold for embeddings made with --mirror.

With --align the images are photos. The face in each is found as tfrecords_tools.align
does it, with the package mtcnn (pip install 'facedist[align]') or OpenCV's YuNet, and
aligned to ArcFace's template; the facts gain "alignment": template, detector and face.
An image without a face is skipped.

  python -m facedist.embed --workdir=/runs/a --input=/data/photos --align \\
    --output=photos.npz
"""

import collections
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging

from facedist import __version__, config, errors, storage
from facedist.config import setting
from facedist.data import face_detection, image_names, image_source
from facedist.data.cache import staged_dataset
from facedist.data.face_detection import DetectorSettings
from facedist.data.shards import manifest
from facedist.distributed import detect, strategies
from facedist.distributed.cluster import Cluster
from facedist.distributed.failure_detector import FailureDetector, Timeouts
from facedist.distributed.supervisor import supervise
from facedist.evaluation import embeddings_file, evaluator
from facedist.evaluation.embedder import Embedder, write_images
from facedist.evaluation.embeddings_file import EmbeddingsWriter
from facedist.evaluation.sphere import Plot
from facedist.training import inference
from facedist.training.config import InputSettings
from facedist.training.inference import EmbeddingSettings

_TIMEOUTS = Timeouts(start=300.0, peer=60.0, step=86_400.0)
_GRACE_SECONDS = 25.0
_ALONE = Cluster()


@dataclasses.dataclass(frozen=True)
class EmbedConfig(DetectorSettings, EmbeddingSettings):
  """What is embedded, with which network, and how."""

  input: str = setting(
    heading="Images and outputs",
    help="Folder of images, or of shards with manifest.json; or a list of images.",
    path=True,
  )
  output: str = setting(
    help="The file to write: .json, .jsonl, .npz or .parquet.", path=True
  )
  split: str | None = setting(
    None, help="Split of the shards; needed if there are several."
  )
  align: bool = setting(
    False, help="Whether to find and align the faces of photos; not for shards."
  )
  strategy: str = setting(
    "one",
    help="Which devices embed: one GPU or the CPU, all GPUs of this machine "
    "(mirrored), or those of all workers (multiworker).",
    choices=tuple(strategies.STRATEGIES),
  )
  batch_size: int = setting(
    128,
    help="Images per call of the network on one device.",
    at_least=1,
    at_most=65_536,
  )
  plot: str | None = setting(
    None,
    help="PNG file for a picture of embeddings of 2 or 3 floats, on their circle or "
    "sphere.",
    path=True,
  )
  cache_dir: str = setting(
    InputSettings.cache_dir,
    help="Folder on a local disk for shards of a bucket.",
    on_disk=True,
  )
  cache_gb: float = setting(
    0.0,
    help="Largest size of --cache_dir, in GB (1e9 bytes); it may be smaller than the "
    "set, because shards are removed after they are embedded. 0: no limit.",
    at_least=0.0,
  )
  overwrite: bool = setting(False, help="Whether to replace an output that exists.")
  strict_alignment: bool = setting(False, help=inference.STRICT_ALIGNMENT_HELP)


@dataclasses.dataclass(frozen=True)
class Input:
  """Images to embed.

  Attributes:
    count: Number of images.
    image_size: Height and width of an image after it is read, in pixels.
    loaders: Each reads one image.
    data: Copies shards of a bucket while the body reads them.
    left_out: Files and folders that are no images by their names, see `NameFilter`.
    alignment: How the images were aligned; None if it is not known.
    alignment_facts: What found the faces that --align aligns; None without it.
  """

  count: int
  image_size: int
  loaders: Iterator[image_source.Loader]
  data: contextlib.AbstractContextManager
  left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
  alignment: str | None = None
  alignment_facts: dict[str, str] | None = None


def main(settings: EmbedConfig) -> int:
  """Embeds the images into the output, alone or as one of several workers."""
  check_outputs(settings)
  cluster = _ALONE
  if settings.strategy == "multiworker":
    cluster = detect.from_environment()
    strategies.check_strategy(settings.strategy, cluster)
  if cluster.num_workers == 1:
    _, num_skipped = embed_images(settings, settings.output)
    return errors.ExitCode.PARTIAL if num_skipped else errors.ExitCode.DONE
  if settings.plot is not None:
    raise errors.UsageError(
      f"--plot={settings.plot} draws what one process embeds, but there are "
      f"{cluster.num_workers} workers; leave it out."
    )
  with supervise(
    cluster,
    facts={"version": __version__, "config": config.to_json(settings)},
    timeouts=_TIMEOUTS,
    grace_seconds=_GRACE_SECONDS,
    heartbeat_file=None,
  ) as supervisor:
    num_skipped = embed_in_parts(settings, cluster, supervisor.detector)
  return errors.ExitCode.PARTIAL if num_skipped else errors.ExitCode.DONE


def embed_in_parts(
  settings: EmbedConfig, cluster: Cluster, detector: FailureDetector
) -> int:
  """Embeds this worker's part of the images; the chief then joins all parts.

  Returns:
    How many images were skipped; on other workers than the chief, of the own part.

  Raises:
    errors.DataError: The chief does not find another worker's part.
  """
  parts = [
    f"{settings.output}.part-{index}-of-{cluster.num_workers}.npz"
    for index in range(cluster.num_workers)
  ]
  own = parts[cluster.index]
  if storage.exists(own):  # of a job that was killed
    storage.remove(own)
  detector.synchronize()
  facts, num_skipped = embed_images(settings, own, cluster, note=detector.note)
  detector.finish()  # before the others may leave
  detector.synchronize()
  if not cluster.is_chief:
    return num_skipped
  for index, part in enumerate(parts):
    if not storage.exists(part):
      raise errors.DataError(
        f"{part} of worker {index} is not there; give an --output on a disk that all "
        "workers share, or in a bucket."
      )
  with embeddings_file.new_file(
    settings.output, facts, overwrite=settings.overwrite
  ) as writer:
    for part in parts:
      detector.note("joining the parts")
      embeddings_file.copy_images(part, writer)
  for part in parts:
    storage.remove(part)
  logging.info("wrote %s, %d images skipped", settings.output, writer.num_skipped)
  return writer.num_skipped


def embed_images(
  settings: EmbedConfig,
  output: str,
  cluster: Cluster = _ALONE,
  *,
  note: Callable[[str], None] = lambda activity: None,
) -> tuple[dict[str, Any], int]:
  """Loads the network, then embeds image after image into a file.

  Args:
    settings: The command's.
    output: The file to write.
    cluster: Whose workers share the images; this one embeds its part of them.
    note: Called with what this worker is doing, at least once a batch.

  Returns:
    The facts of the file, and how many images were skipped.
  """
  strategy = None
  if settings.strategy != "one":
    os.environ.pop("TF_CONFIG", None)  # TensorFlow would look for the other workers
    strategy = strategies.make_strategy("mirrored", _ALONE)
    logging.info("embedding on %d devices", strategies.local_replicas(strategy))
  checkpoint = evaluator.find_checkpoint(settings.workdir, settings.checkpoint)
  network = inference.load_network(
    settings.workdir, checkpoint, weights=settings.weights, strategy=strategy
  )
  images = open_input(settings, network.image_size, cluster)
  inference.check_alignment(
    checkpoint.marker(),
    images.alignment,
    data=f"--input={settings.input}",
    is_strict=settings.strict_alignment,
  )
  plot = None
  if settings.plot is not None:
    plot = Plot(
      embedding_size=network.embedding_size,
      num_images=images.count,
      flag=f"--plot={settings.plot}",
    )
  logging.info("embedding %d images with %s", images.count, network.name)
  if images.left_out:
    logging.warning("left out: %s", image_names.described(images.left_out))
  embedder = Embedder(
    network=network.embed,
    network_name=network.name,
    batch_size=settings.batch_size
    * (1 if strategy is None else strategies.local_replicas(strategy)),
    mirror=settings.mirror,
    normalize=settings.normalize,
  )
  facts = inference.network_facts(
    network, checkpoint, normalize=settings.normalize, mirror=settings.mirror
  )
  if images.left_out:
    facts |= {"left_out": images.left_out}
  if images.alignment_facts:
    facts |= {"alignment": images.alignment_facts}
  with (
    images.data,
    embeddings_file.new_file(output, facts, overwrite=settings.overwrite) as writer,
  ):
    write_embeddings(images, embedder, writer, plot, note=note)
  if plot is not None and settings.plot is not None:
    storage.write_bytes(settings.plot, plot.png(network.name))
  logging.info("wrote %s, %d images skipped", output, writer.num_skipped)
  return facts, writer.num_skipped


def check_outputs(settings: EmbedConfig) -> None:
  """Raises UsageError for outputs that cannot be written, or would be replaced."""
  if settings.plot is not None and not settings.plot.endswith(".png"):
    raise errors.UsageError(f"--plot={settings.plot} must end in .png; rename it.")
  for flag, path in (("output", settings.output), ("plot", settings.plot)):
    storage.check_file(path, flag=flag)
    if path is not None and storage.exists(path) and not settings.overwrite:
      raise errors.UsageError(
        f"--{flag}={path} exists; choose another name or add --overwrite."
      )
  embeddings_file.check_format(settings.output, flag="output")


def _report_fit(fits: Mapping[str, int], image_size: int) -> None:
  """Says how images of other sizes were brought to the network's."""
  if fits["resized"] or fits["cropped"]:
    logging.warning(
      "of %d images, %d were resized to %d x %d, and %d that are not square were cut "
      "to the largest square in their middle first. No face was looked for: embed "
      "images that are aligned as the training images were, or add --align.",
      sum(fits.values()),
      fits["resized"] + fits["cropped"],
      image_size,
      image_size,
      fits["cropped"],
    )


def write_embeddings(
  images: Input,
  embedder: Embedder,
  writer: EmbeddingsWriter,
  plot: Plot | None = None,
  *,
  note: Callable[[str], None] = lambda activity: None,
) -> None:
  """Embeds image after image; what cannot be read is named and noted as skipped."""
  fits: collections.Counter[str] = collections.Counter()
  for faces, embeddings in write_images(
    images.loaders, embedder, writer, total=images.count
  ):
    note("embedding")
    fits.update(face.fit for face in faces)
    if plot is not None:
      for face, embedding in zip(faces, embeddings, strict=True):
        plot.add(identity=face.identity, embedding=embedding)
  _report_fit(fits, images.image_size)


def open_input(
  settings: EmbedConfig,
  image_size: int,
  cluster: Cluster = _ALONE,
) -> Input:
  """Finds this worker's part of the images of --input, without reading them.

  Raises:
    errors.UsageError: --input does not exist, or --split or --align does not fit it.
    errors.DataError: There are no images.
  """
  folder = settings.input
  is_list = _is_file(folder)
  if not (is_list or storage.is_bucket(folder) or os.path.isdir(folder)):
    raise errors.UsageError(
      f"--input={folder} must be a folder of images or of shards, or a list of images; "
      "check its spelling."
    )
  if is_list and folder.lower().endswith(image_names.ENDINGS):
    raise errors.UsageError(
      f"--input={folder} is an image; give its folder, or a list with its path."
    )
  if settings.yunet is not None and not settings.align:
    raise errors.UsageError(f"--yunet={settings.yunet} is for --align; add it.")
  if not is_list and storage.exists(storage.join(folder, manifest.MANIFEST_NAME)):
    if settings.align:
      raise errors.UsageError(
        f"--align is for photos, but --input={folder} holds shards, whose images are "
        "aligned when they are built; leave --align out."
      )
    return _open_shards(settings, image_size, cluster)
  if settings.split is not None:
    raise errors.UsageError(
      f"--split={settings.split} is for shards, but --input={folder} has no "
      f"{manifest.MANIFEST_NAME}; leave --split out."
    )
  names = image_names.NameFilter()
  if is_list:
    count = sum(1 for _ in image_source.listed_images(folder))
  else:
    count = sum(1 for _ in image_source.image_paths(folder, names))
  if not count and is_list:
    raise errors.DataError(f"--input={folder} lists no images; write a path a line.")
  if not count:
    raise errors.DataError(
      f"--input={folder} has no images ({', '.join(image_names.ENDINGS)}) in any "
      f"folder{names.note()}; check the path."
    )
  own = _part(count, cluster)
  finder = face_detection.load(settings) if settings.align else None
  load = image_source.list_loaders if is_list else image_source.folder_loaders
  loaders = load(folder, image_size=image_size, finder=finder)
  return Input(
    len(own),
    image_size,
    itertools.islice(loaders, own.start, own.stop),
    contextlib.nullcontext(),
    names.left_out,
    alignment=finder.facts["template"] if finder else None,
    alignment_facts=finder.facts if finder else None,
  )


def _is_file(path: str) -> bool:
  """Says whether a path is a file or an object, not a folder or a whole bucket."""
  if os.path.isdir(path) or path.endswith("/"):  # a console's placeholder may end so
    return False
  if storage.is_bucket(path) and "/" not in path.removeprefix("gs://"):
    return False
  return storage.exists(path)


def _part(count: int, cluster: Cluster) -> range:
  """Returns which of `count` images this worker embeds."""
  ends = [
    count * each // cluster.num_workers for each in range(cluster.num_workers + 1)
  ]
  return range(ends[cluster.index], ends[cluster.index + 1])


def _open_shards(settings: EmbedConfig, image_size: int, cluster: Cluster) -> Input:
  """Finds the records of a folder of shards."""
  folder = settings.input
  described = manifest.load(folder)
  if settings.split is None and len(described.splits) > 1:
    raise errors.UsageError(
      f"--input={folder} has several splits; choose one with --split="
      f"{'|'.join(sorted(described.splits))}."
    )
  if described.image_size != image_size:
    raise errors.UsageError(
      f"--input={folder} holds images {described.image_size} pixels wide, but the run "
      f"in {settings.workdir} takes {image_size}; build shards with "
      f"--image_size={image_size}."
    )
  split = settings.split or next(iter(described.splits))
  own = _part(described.split(split, folder).records, cluster)
  data = staged_dataset.open_set(
    folder,
    settings.cache_dir,
    cache_gb=settings.cache_gb,
    accept_corrupt=True,  # each record is checked, and a corrupt one named
    keep=False,
  )
  loaders = image_source.loaders(data, split, image_size=image_size, records=own)
  return Input(len(own), image_size, loaders, data, alignment=described.aligned_by)


def run() -> None:
  """Runs the command line."""
  config.run_command(main, EmbedConfig)


if __name__ == "__main__":
  run()
