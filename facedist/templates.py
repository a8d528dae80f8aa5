"""Scores a checkpoint on IJB-B, IJB-C or TinyFace.

The folder is as InsightFace's evaluation lays it out, with loose_crop and meta:

  python -m facedist.templates --protocol=ijbc --data=/data/IJBC --workdir=/runs/a \\
    --embeddings=ijbc.npz --output=ijbc.json

The images are embedded once into the file --embeddings. Where it is there, it is read,
so the figures of another pooling need no network and no images:

  python -m facedist.templates --protocol=ijbc --data=/data/IJBC \\
    --embeddings=ijbc.npz --use_face_scores=false

ijbb, ijbc   Each loose crop is aligned by its five points. An embedding is that of the
             image plus that of its mirror image, times the face score; it keeps its
             length. It is averaged over each medium of a template and then over the
             media, and the sum is scaled to length 1. These are the settings of
             InsightFace's eval_ijbc.py; --mirror, --use_norms and --use_face_scores
             change them.
tinyface     The folder has Probe, Gallery_Match and Gallery_Distractor, or Testing_Set
             with them. Identities are those of the two .mat lists, or of file names
             such as 12_3.jpg. Images are resized to the network's input: no face is
             looked for, so give aligned copies, under the same names, if that is what
             you compare with.

It prints a table. --output has the same as JSON, and what made it:

  verification    1:1, AUC, EER, and at each FAR the TAR with at most that FAR, its 95 %
                  interval over subjects and its threshold; nearest_tar is the TAR where
                  FAR is nearest, as InsightFace prints it
  identification  1:N, where its lists are there: rank-1, 5 and 10 in all galleries
                  together, and TPIR (1 - FNIR) at FPIR 0.1 and 0.01: tpir_at_fpir for
                  probes without a mate, the mean over the galleries;
                  pairwise_tpir_at_fpir as InsightFace's ijb_1n.py computes it
  search          TinyFace: rank-1, rank-5 and CMC

An image that cannot be read is named and skipped, and the exit code is 5.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from absl import logging

from facedist import __version__, config, errors, storage
from facedist.config import setting
from facedist.data import alignment, decoding, image_source
from facedist.evaluation import embeddings_file, evaluator, provenance, templates
from facedist.evaluation.embedder import Embedder, write_images
from facedist.evaluation.embeddings_file import EmbeddingsFile
from facedist.evaluation.templates import IjbSet, TinyFaceSet
from facedist.training import inference
from facedist.training.checkpoint import checkpoints

PROTOCOLS = ("ijbb", "ijbc", "tinyface")
_CROPS = "loose_crop"


@dataclasses.dataclass(frozen=True)
class TemplatesConfig:
  """Which protocol is scored, and with which embeddings."""

  protocol: str = setting(help="The protocol.", choices=PROTOCOLS)
  data: str = setting(
    help="Folder of the set: with meta and loose_crop, or with TinyFace's folders.",
    path=True,
  )
  embeddings: str = setting(
    help="File of embeddings, .npz or .parquet: read if it is there, else written.",
    path=True,
  )
  output: str | None = setting(None, help="JSON file for the figures.", path=True)
  overwrite: bool = setting(False, help="Whether to replace an --output that exists.")
  workdir: str | None = setting(
    None,
    help="Folder of the training run; not needed where --embeddings is there.",
    path=True,
    heading="Network",
  )
  checkpoint: str | None = setting(
    None, help="Step or path of the checkpoint; the newest if not given.", path=True
  )
  weights: str = setting("auto", help=inference.WEIGHTS_HELP, choices=inference.WEIGHTS)
  mirror: bool = setting(
    True, help="Whether to embed image plus mirrored image, as evaluation does."
  )
  batch_size: int = setting(
    128, help="Images per call of the network.", at_least=1, at_most=65_536
  )
  use_norms: bool = setting(
    True,
    help="Whether an embedding's length is its weight in a template of IJB.",
    heading="Pooling",
  )
  use_face_scores: bool = setting(
    True, help="Whether the face score is a weight in a template of IJB."
  )


@dataclasses.dataclass(frozen=True)
class Images:
  """The images of a protocol.

  Attributes:
    names: What the file of embeddings calls each.
    load: Returns the uint8[S, S, 3] RGB face of the image of a place and an image size.
    alignment: How faces are cut, as a checkpoint names it; None if not known.
  """

  names: list[str]
  load: Callable[[int, int], np.ndarray]
  alignment: str | None


def main(settings: TemplatesConfig) -> int:
  """Reads the lists, embeds the images unless that is done, and scores.

  Raises:
    errors.UsageError: Flags contradict each other or the file of embeddings.
    errors.DataError: A list or an image of the set is missing or wrong.
  """
  check_outputs(settings)
  is_tinyface = settings.protocol == "tinyface"
  logging.info("reading the lists of %s", settings.data)
  if is_tinyface:
    tiny = templates.read_tinyface(settings.data)
    images = Images(tiny.names, functools.partial(_resized, settings.data, tiny), None)
  else:
    ijb = templates.read_ijb(settings.data, settings.protocol)
    images = Images(
      ijb.names, functools.partial(_aligned, settings.data, ijb), "arcface"
    )
  if not storage.exists(settings.embeddings):
    if not is_tinyface:
      check_crops(settings.data, ijb)
    embed(settings, images)
  loaded, places = load(settings, images.names)
  num_skipped = int((places < 0).sum())
  if num_skipped:
    logging.warning(
      "%d of %d images have no embedding, such as %s; the figures are without them",
      num_skipped,
      len(places),
      images.names[int((places < 0).argmax())],
    )
  facts = {
    "protocol": settings.protocol,
    "data": settings.data,
    "lists_crc32c": templates.crc32c(tiny if is_tinyface else ijb),
    "facedist": __version__,
    "network": loaded.facts,
    "num_images": len(places),
    "num_skipped": num_skipped,
  }
  if is_tinyface:
    figures = score_tinyface(tiny, loaded, places)
  else:
    facts["pooling"] = {
      "mirror": loaded.facts.get("mirrored"),
      "use_norms": settings.use_norms,
      "use_face_scores": settings.use_face_scores,
    }
    pooled = pool_ijb(settings, ijb, loaded, places)
    del loaded  # a gigabyte for IJB-C, which the scores take instead
    figures = score_ijb(ijb, pooled)
  print(table(settings.protocol, figures), flush=True)
  if settings.output is not None:
    text = json.dumps(facts | figures, indent=1) + "\n"
    storage.write_bytes(settings.output, text.encode())
  return errors.ExitCode.PARTIAL if num_skipped else errors.ExitCode.DONE


def check_outputs(settings: TemplatesConfig) -> None:
  """Raises UsageError for outputs that cannot be written, or would be replaced."""
  embeddings_file.check_format(settings.embeddings, flag="embeddings")
  if not storage.exists(settings.embeddings):
    if settings.workdir is None:
      raise errors.UsageError(
        f"--embeddings={settings.embeddings} does not exist; add --workdir to make it, "
        "or check its spelling."
      )
    storage.check_file(settings.embeddings, flag="embeddings")
  storage.check_file(settings.output, flag="output")
  if (
    settings.output is not None
    and storage.exists(settings.output)
    and not settings.overwrite
  ):
    raise errors.UsageError(
      f"--output={settings.output} exists; choose another name or add --overwrite."
    )


def check_crops(folder: str, ijb: IjbSet) -> None:
  """Raises DataError, before hours of work, where an image of the lists is missing."""
  crops = storage.join(folder, _CROPS)
  there = set(storage.list_names(crops))
  absent = [name for name in ijb.names if name not in there]
  if absent:
    raise errors.DataError(
      f"{crops} lacks {len(absent)} of {len(ijb.names)} images, such as {absent[0]}; "
      "unpack the whole set, or check --data."
    )


def embed(settings: TemplatesConfig, images: Images) -> None:
  """Embeds all images into --embeddings; what cannot be read is named and skipped."""
  checkpoint = evaluator.find_checkpoint(str(settings.workdir), settings.checkpoint)
  network = inference.load_network(
    str(settings.workdir), checkpoint, weights=settings.weights
  )
  inference.check_alignment(
    checkpoint.marker(),
    images.alignment,
    data=f"--data={settings.data}",
    is_strict=False,
  )
  embedder = Embedder(
    network=network.embed,
    network_name=network.name,
    batch_size=settings.batch_size,
    mirror=settings.mirror,
    normalize=False,
  )
  facts = {
    "protocol": settings.protocol,
    "alignment": images.alignment,
    **inference.network_facts(
      network, checkpoint, normalize=False, mirror=settings.mirror
    ),
    **provenance.environment(),
  }
  loaders = (
    functools.partial(_face, images, place, network.image_size)
    for place in range(len(images.names))
  )
  logging.info("embedding %d images with %s", len(images.names), network.name)
  with embeddings_file.new_file(settings.embeddings, facts, overwrite=False) as writer:
    for _ in write_images(loaders, embedder, writer, total=len(images.names)):
      pass
  logging.info("wrote %s, %d images skipped", settings.embeddings, writer.num_skipped)


def load(
  settings: TemplatesConfig, names: list[str]
) -> tuple[EmbeddingsFile, np.ndarray]:
  """Reads --embeddings and finds the images in it.

  Returns:
    The file, with embeddings as long as the network made them, and int64[images], the
    place of each image in it, -1 where it was skipped.

  Raises:
    errors.UsageError: The file is of another network, protocol or mirror mode.
    errors.DataError: It has none of the images, or its embeddings have length 1 while
      their length is a weight.
  """
  loaded = embeddings_file.load_embeddings(settings.embeddings, scaled=False)
  wanted: dict[str, Any] = {
    "protocol": settings.protocol,
    "mirrored": settings.mirror,
  }
  if settings.workdir is not None:
    checkpoint = evaluator.find_checkpoint(settings.workdir, settings.checkpoint)
    weights = inference.choose_weights(
      checkpoints.load_config(settings.workdir), settings.weights
    )
    wanted["weights_crc32c"] = inference.weights_crc32c(checkpoint, weights)
  for fact, value in wanted.items():
    if loaded.facts.get(fact, value) != value:
      raise errors.UsageError(
        f"--embeddings={settings.embeddings} has {fact} {loaded.facts[fact]}, not "
        f"{value} as the flags ask; give another name, which is then written."
      )
  if (
    settings.protocol != "tinyface"
    and settings.use_norms
    and loaded.facts.get("normalized")
  ):
    raise errors.UsageError(
      f"--embeddings={settings.embeddings} has embeddings of length 1, which is no "
      "weight; add --use_norms=false, or give another name, which is then written."
    )
  place_of = {path: place for place, path in enumerate(loaded.paths)}
  places = np.array([place_of.get(name, -1) for name in names])
  if places.max() < 0:
    raise errors.DataError(
      f"{settings.embeddings} has none of the {len(names)} images of {settings.data}, "
      f"such as {names[0]}; give the file of this set."
    )
  return loaded, places


def pool_ijb(
  settings: TemplatesConfig, ijb: IjbSet, loaded: EmbeddingsFile, places: np.ndarray
) -> np.ndarray:
  """Returns the embeddings of all templates, float64[templates, embedding].

  Raises:
    errors.DataError: A template has no image with an embedding.
  """
  row_places = places[ijb.image_of]
  known = row_places >= 0
  absent = np.setdiff1d(np.arange(len(ijb.templates)), ijb.template_of[known])
  if len(absent):
    raise errors.DataError(
      f"{len(absent)} of {len(ijb.templates)} templates have no image with an "
      f"embedding, such as template {ijb.templates[absent[0]]}; look at the warnings "
      "about skipped images."
    )
  logging.info("pooling %d templates", len(ijb.templates))
  weights = ijb.face_scores[ijb.image_of][known] if settings.use_face_scores else None
  _, pooled = templates.pool(
    loaded.embeddings,
    ijb.template_of[known],
    ijb.medium_of[known],
    weights=weights,
    use_norms=settings.use_norms,
    rows=row_places[known],
  )
  return pooled


def score_ijb(ijb: IjbSet, pooled: np.ndarray) -> dict[str, Any]:
  """Returns the figures of IJB-B or IJB-C."""
  logging.info("scoring %d pairs of templates", len(ijb.same))
  scores = templates.pair_scores(pooled, ijb.first, ijb.second)
  verified = templates.verify(scores, ijb.same, subjects=_subjects(ijb))
  figures: dict[str, Any] = {
    "num_templates": len(ijb.templates),
    "verification": dataclasses.asdict(verified),
  }
  if ijb.probes is None:
    logging.info("no 1:N: its lists are not there")
  else:
    logging.info("searching %d probes", len(ijb.probes.places))
    identified = templates.identify(pooled, ijb.probes, ijb.galleries)
    figures["identification"] = dataclasses.asdict(identified)
  return figures


def score_tinyface(
  tiny: TinyFaceSet, loaded: EmbeddingsFile, places: np.ndarray
) -> dict[str, Any]:
  """Returns the figures of TinyFace."""
  embeddings = loaded.embeddings
  embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
  known = places >= 0
  is_gallery = np.arange(len(places)) < tiny.num_gallery
  gallery, probes = known & is_gallery, known & ~is_gallery
  logging.info("searching %d probes", probes.sum())
  found = templates.search_images(
    embeddings[places[probes]],
    tiny.identities[probes],
    embeddings[places[gallery]],
    tiny.identities[gallery],
  )
  return {"search": dataclasses.asdict(found)}


def table(protocol: str, figures: dict[str, Any]) -> str:
  """Returns the figures as lines for people."""
  if search := figures.get("search"):
    ranks = (
      ("1", search["rank_1"]),
      ("5", search["rank_5"]),
      ("20", search["cmc"][-1]),
    )
    return (
      f"{protocol}: {search['num_probes']} probes among {search['num_gallery']} "
      "images\n  " + "   ".join(f"rank-{name} {rate:.4f}" for name, rate in ranks)
    )
  verified = figures["verification"]
  lines = [
    f"{protocol} 1:1, {verified['num_same']} pairs of one person, "
    f"{verified['num_different']} of two: AUC {verified['auc']:.6f}, EER "
    f"{verified['eer']:.4f}",
    "      FAR  TAR at most  95 % interval   threshold  TAR nearest",
  ]
  for at in verified["tar_at_far"]:
    interval = "       -       "
    if at["low"] is not None:
      interval = f"{at['low']:.4f} - {at['high']:.4f}"
    lines.append(
      f"  {at['far']:7.0e}       {at['tar']:.4f}  {interval}   {at['threshold']:8.4f}"
      f"       {at['nearest_tar']:.4f}"
    )
  if found := figures.get("identification"):
    lines += [
      f"{protocol} 1:N, {found['num_probes']} probes, {found['num_subjects']} subjects",
      f"  rank-1 {found['rank_1']:.4f}   rank-5 {found['rank_5']:.4f}   rank-10 "
      f"{found['rank_10']:.4f}",
    ]
    for name, what in (
      ("tpir_at_fpir", "by probes without a mate, mean over galleries"),
      ("pairwise_tpir_at_fpir", "by pairs, as InsightFace's"),
    ):
      points = "   ".join(f"{at['fpir']:g}: {at['tpir']:.4f}" for at in found[name])
      lines.append(f"  TPIR at FPIR {points or 'not measurable'} ({what})")
  return "\n".join(lines)


def _subjects(ijb: IjbSet) -> np.ndarray | None:
  """Returns int32[pairs, 2], subjects from 0; None unless all pairs agree with them."""
  if (ijb.subject_of < 0).any():
    logging.info("no intervals: the lists of 1:N do not name every template's subject")
    return None
  numbers = np.unique(ijb.subject_of, return_inverse=True)[1].astype(np.int32)
  subjects = np.stack([numbers[ijb.first], numbers[ijb.second]], axis=1)
  contradicted = (subjects[:, 0] == subjects[:, 1]) != ijb.same
  if contradicted.any():
    logging.warning(
      "no intervals: the labels of %d pairs contradict the subjects of the lists of "
      "1:N",
      contradicted.sum(),
    )
    return None
  return subjects


def _face(
  images: Images, place: int, image_size: int
) -> image_source.Face | image_source.Unreadable:
  """Reads one image."""
  try:
    return image_source.Face(images.names[place], None, images.load(place, image_size))
  except errors.DataError as error:
    return image_source.Unreadable(images.names[place], str(error))


def _aligned(folder: str, ijb: IjbSet, place: int, image_size: int) -> np.ndarray:
  """Returns the face of a loose crop, aligned by its points."""
  content = storage.read_bytes(storage.join(folder, _CROPS, ijb.names[place]))
  warp = alignment.warp_to_template(ijb.landmarks[place], size=image_size)
  face = alignment.align(decoding.decode(content), warp, size=image_size)
  return cv2.cvtColor(face, cv2.COLOR_BGR2RGB)


def _resized(folder: str, tiny: TinyFaceSet, place: int, image_size: int) -> np.ndarray:
  """Returns an image of TinyFace in the size of the network's input."""
  content = storage.read_bytes(storage.join(folder, tiny.names[place]))
  return image_source.decode(content, image_size=image_size)


def run() -> None:
  """Runs the command line."""
  config.run_command(main, TemplatesConfig)


if __name__ == "__main__":
  run()
