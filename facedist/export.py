"""Writes a run's network for other programs: SavedModel, ONNX, TFLite; gs:// works too.

The name of the output decides: FILE.onnx and FILE.tflite are files of these formats,
any other name is the folder of a SavedModel.

  python -m facedist.export --workdir=/runs/a --output=/models/faces/1
  python -m facedist.export --workdir=/runs/a --output=faces.onnx
  python -m facedist.export --workdir=/runs/a --output=faces.tflite --precision=int8 \\
    --calibration=/data/vggface2_112

None of them needs facedist or detects faces: images must be aligned as the training
images were, and of S x S pixels. All return embeddings, float32[batch, E], those of
facedist.embed.

The first command writes version 1 of a model for TensorFlow Serving with
--model_base_path=/models/faces. Any program that loads a SavedModel can use it:

  model = tf.saved_model.load("/models/faces/1")
  model.signatures["serving_default"](images=pixels)["embeddings"]

It has two signatures:

  serving_default   takes images, uint8[batch, S, S, 3], RGB, not scaled
  serving_encoded   takes image_bytes, string[batch], JPEG or PNG files of S x S pixels,
                    and turns them upright by their EXIF orientation

The ONNX file takes images, float32[batch, 3, S, S], RGB as (x - 127.5) / 127.5; with
--layout=nhwc, float32[batch, S, S, 3]. It is of opset 13 and needs pip install
'facedist[onnx]' to be written. At 112 pixels it fits InsightFace's recognition models:

  recognition = insightface.model_zoo.get_model("faces.onnx")
  recognition.get_feat(aligned_bgr_image)

The TFLite file takes one image, float32[1, S, S, 3], RGB in [0, 255]. --precision=
float16 stores weights in half the bytes. With int8 all is of 8 bits: the image is
uint8[1, S, S, 3], and the embedding int8, neither of length 1 nor mirrored; its scale
and zero point are in the file. The ranges of activations are those of 256 images of
--calibration, a folder of shards or of aligned images like those of the training.

Facts describe each model, in assets.extra/facedist.json of the SavedModel, under the
key facedist of the ONNX file's metadata: model, checkpoint, step, weights,
weights_crc32c, embedding_size, image_size, normalized, mirrored, channels, policy,
data_fingerprint, alignment (the template; null if not known) and tool_version;
signatures of a SavedModel, opset and layout, or precision and calibration_images. Of a
TFLite file they are on the card only. Cosine thresholds of facedist.evaluate
hold for models with --mirror, which takes twice as long.

A model card in Markdown lies beside it, as model_card.md in the folder of a SavedModel
or as faces.onnx.md: data, configuration, scores of the checkpoint from metrics.jsonl
by set and group, hashes and versions, input and output, and what the model must not be
used for. So evaluate the run first. --verification_data=/data/lfw_112 also scores the
exported model itself, prints a JSON line a set, and adds the scores to the card.

A file computes in float32 (or int8), also if the run trained in 16 bits; the SavedModel
has the run's precision.

The output appears under its name only after the model was loaded again and gave the
same embeddings as the run: ONNX and TFLite in float32 to 1e-4 of an embedding's length,
float16 with a cosine of at least 0.999, a SavedModel of 0.99, and int8 of 0.9 in the
mean over the calibration images. An existing file or folder is never changed.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from facedist import __version__, config, errors, storage
from facedist.config import setting
from facedist.data import image_names, image_source
from facedist.data.cache import staged_dataset
from facedist.data.shards import manifest
from facedist.data.verification_set import VerificationSet, load_verification_sets
from facedist.distributed import strategies
from facedist.evaluation import (
  evaluator,
  model_card,
  provenance,
  report,
  verification,
)
from facedist.evaluation.embedder import Embedder
from facedist.evaluation.score_log import Row
from facedist.models import onnx_file, serving, tflite_file
from facedist.training import inference
from facedist.training.checkpoint import checkpoints
from facedist.training.config import InputSettings
from facedist.training.inference import EmbeddingSettings

FACTS_NAME = "assets.extra/facedist.json"
ONNX, TFLITE = ".onnx", ".tflite"
CARD_NAME = "model_card.md"
"""The model card in the folder of a SavedModel."""
CARD_SUFFIX = ".md"
"""What a file's name gets for the name of its model card."""
_PROBES = 4
_SCORED_AT_ONCE = 32
_MIN_COSINE = 0.99  # fused kernels round otherwise in half precision
_MAX_DIFFERENCE = 1e-4  # of an embedding's float, where its length is 1
_MIN_COSINE_FLOAT16, _MIN_MEAN_COSINE_INT8 = 0.999, 0.9
_CALIBRATION_IMAGES = 256

# Markdown for the model card; fields: side, size, name and length.
_SAVED_MODEL_USAGE = """\
A SavedModel with two signatures. Both return `embeddings`, `float32[batch, {size}]`,
{length}.

- `serving_default` takes `images`, `uint8[batch, {side}, {side}, 3]`: RGB pixels, not
  scaled.
- `serving_encoded` takes `image_bytes`, `string[batch]`: JPEG or PNG files, turned
  upright by their EXIF orientation.

```python
model = tf.saved_model.load("{name}")
embeddings = model.signatures["serving_default"](images=pixels)["embeddings"]
```"""
_ONNX = """\
An ONNX file with one input and one output, `embeddings`, `float32[batch, {size}]`,
{length}. The input is `images`, `float32[batch, SHAPE]`: RGB pixels, scaled to
(x - 127.5) / 127.5.

```python
session = onnxruntime.InferenceSession("{name}")
scaled = (pixels.astype("float32") - 127.5) / 127.5  # uint8[batch, {side}, {side}, 3]
(embeddings,) = session.run(None, {{"images": GIVEN}})
```"""
_ONNX_USAGE = {
  "nchw": _ONNX.replace("SHAPE", "3, {side}, {side}").replace(
    "GIVEN", "scaled.transpose(0, 3, 1, 2)"
  ),
  "nhwc": _ONNX.replace("SHAPE", "{side}, {side}, 3").replace("GIVEN", "scaled"),
}
_TFLITE_USAGE = """\
A TFLite file that takes one image, `float32[1, {side}, {side}, 3]`: RGB pixels in
[0, 255]. It returns one embedding, `float32[1, {size}]`, {length}.

```python
interpreter = tf.lite.Interpreter("{name}")
interpreter.allocate_tensors()
(takes,), (returns,) = interpreter.get_input_details(), interpreter.get_output_details()
interpreter.set_tensor(takes["index"], pixels[None].astype("float32"))
interpreter.invoke()
embedding = interpreter.get_tensor(returns["index"])[0]
```"""
_INT8_USAGE = """\
A TFLite file that takes one image, `uint8[1, {side}, {side}, 3]`: RGB pixels. It
returns one embedding, `int8[1, {size}]`, which stands for (value - zero_point) * scale,
{length}.

```python
interpreter = tf.lite.Interpreter("{name}")
interpreter.allocate_tensors()
(takes,), (returns,) = interpreter.get_input_details(), interpreter.get_output_details()
interpreter.set_tensor(takes["index"], pixels[None])
interpreter.invoke()
scale, zero_point = returns["quantization"]
embedding = (interpreter.get_tensor(returns["index"])[0] - float(zero_point)) * scale
```"""


@dataclasses.dataclass(frozen=True)
class ExportConfig(EmbeddingSettings):
  """Which network is exported, and where to."""

  output: str = setting(
    heading="The exported model",
    help="FILE.onnx, FILE.tflite, or the folder of a SavedModel; if it exists, it must "
    "be an empty folder.",
    path=True,
  )
  layout: str = setting(
    "nchw",
    help="Axes of an ONNX file's input: nchw, as PyTorch has them and InsightFace "
    "needs them, or nhwc.",
    choices=onnx_file.LAYOUTS,
  )
  precision: str = setting(
    "float32",
    help="Numbers in a TFLite file: float32; float16, for weights alone; or int8, for "
    "all, which needs --calibration.",
    choices=tflite_file.PRECISIONS,
  )
  calibration: str | None = setting(
    None,
    help="Folder of shards or of aligned images that int8 is calibrated on, such as "
    "the training data.",
    path=True,
  )
  verification_data: str | None = setting(
    None,
    help="Folders of verification sets, as of facedist.evaluate: scores the exported "
    "model itself on them.",
    paths=True,
  )


@dataclasses.dataclass(frozen=True)
class Source:
  """What is exported, and what it is calibrated and scored on.

  Attributes:
    settings: The flags.
    checkpoint: Has the weights.
    network: With these weights.
    facts: Those that are written with the model.
    sets: The verification sets that the exported model is scored on.
    calibration: uint8[images, S, S, 3] RGB, for int8 only.
  """

  settings: ExportConfig
  checkpoint: checkpoints.Checkpoint
  network: inference.InferenceNetwork
  facts: dict[str, Any]
  sets: tuple[VerificationSet, ...] = ()
  calibration: np.ndarray | None = None


def main(settings: ExportConfig) -> None:
  """Loads the network, writes the model beside its place and tries it there."""
  check_flags(settings)
  strategies.share_gpus()
  checkpoint = evaluator.find_checkpoint(settings.workdir, settings.checkpoint)
  sets = open_sets(settings, checkpoint)
  calibration = None
  if settings.calibration is not None:
    image_size = int(checkpoint.marker()["image_size"])
    calibration = read_calibration(settings.calibration, image_size=image_size)
  is_file = _suffix(settings) in (ONNX, TFLITE)
  network = inference.load_network(
    settings.workdir,
    checkpoint,
    weights=settings.weights,
    policy="float32" if is_file else None,
  )
  source = Source(
    settings,
    checkpoint,
    network,
    describe(settings, network, checkpoint, calibration),
    sets,
    calibration,
  )
  logging.info(
    "exporting %s, for images aligned by: %s",
    network.name,
    source.facts["alignment"] or "not known",
  )
  try:
    if is_file:
      export_file(source)
    else:
      export_saved_model(source)
  except FileExistsError as error:
    raise errors.UsageError(
      f"--output={settings.output} was made by another process meanwhile; choose "
      "another name."
    ) from error
  except OSError as error:
    raise errors.UsageError(
      f"--output={settings.output} cannot be written ({error.strerror or error}); "
      "choose another folder."
    ) from error
  logging.info("wrote %s", settings.output)


def check_flags(settings: ExportConfig) -> None:
  """Raises UsageError for an output that cannot be made, or another format's flag."""
  suffix, output = _suffix(settings), settings.output
  for flag, default, fits in (
    ("layout", "nchw", ONNX),
    ("precision", "float32", TFLITE),
  ):
    value = getattr(settings, flag)
    if value != default and suffix != fits:
      raise errors.UsageError(
        f"--{flag}={value} is for a name that ends in {fits}, but --output={output} "
        f"does not; leave --{flag} out."
      )
  is_int8 = settings.precision == "int8"
  if is_int8 and settings.calibration is None:
    raise errors.UsageError(
      "--precision=int8 needs --calibration, a folder of shards or of aligned images "
      "whose activations decide the ranges of the integers, such as the training data."
    )
  if settings.calibration is not None and not is_int8:
    raise errors.UsageError(
      f"--calibration={settings.calibration} is for --precision=int8; leave it out."
    )
  if is_int8 and settings.mirror:
    raise errors.UsageError(
      "--mirror is not for --precision=int8: embed image and mirror image, then add "
      "both embeddings; leave --mirror out."
    )
  if suffix not in (ONNX, TFLITE) and (
    meant := difflib.get_close_matches(suffix, (ONNX, TFLITE))
  ):
    raise errors.UsageError(
      f"--output={output} ends in {suffix}; write {meant[0]}, or a folder's name "
      "without an ending for a SavedModel."
    )
  if suffix == ONNX:
    onnx_file.check_installed()
  if suffix in (ONNX, TFLITE):
    check_file(output)
  else:
    check_folder(output)


def check_file(output: str) -> None:
  """Raises UsageError where something is already, or nothing can be written."""
  storage.check_file(output, flag="output")
  for path in (output, output + CARD_SUFFIX):
    if storage.exists(path):
      raise errors.UsageError(
        f"--output={output} would replace {path}, which exists; choose another name."
      )


def open_sets(
  settings: ExportConfig, checkpoint: checkpoints.Checkpoint
) -> tuple[VerificationSet, ...]:
  """Opens the sets of --verification_data; warns of another alignment.

  Raises:
    errors.UsageError: A set's images are not of the network's size.
    errors.DataError: A folder has no verification set.
  """
  if settings.verification_data is None:
    return ()
  sets = load_verification_sets(
    settings.verification_data, InputSettings.cache_dir, cache_gb=0.0
  )
  inference.check_verification_sets(checkpoint.marker(), sets)
  return sets


def read_calibration(folder: str, *, image_size: int) -> np.ndarray:
  """Reads up to 256 images, evenly spread over a folder of shards or of images.

  Returns:
    uint8[images, image_size, image_size, 3] RGB.

  Raises:
    errors.UsageError: It is no folder.
    errors.DataError: There are no images, or they are of another size.
  """
  flag = f"--calibration={folder}"
  if not storage.is_bucket(folder) and not os.path.isdir(folder):
    raise errors.UsageError(
      f"{flag} must be a folder of images or of shards; check its spelling."
    )
  with contextlib.ExitStack() as stack:
    if storage.exists(storage.join(folder, manifest.MANIFEST_NAME)):
      content = manifest.load(folder)
      split = "train" if "train" in content.splits else next(iter(content.splits))
      count = content.split(split, folder).records
      data = stack.enter_context(
        staged_dataset.open_set(
          folder,
          InputSettings.cache_dir,
          cache_gb=0.0,
          accept_corrupt=True,
          keep=False,
        )
      )
      loaders = image_source.loaders(data, split, image_size=content.image_size)
    else:
      names = image_names.NameFilter()
      count = sum(1 for _ in image_source.image_paths(folder, names))
      loaders = image_source.folder_loaders(folder, image_size=image_size)
    step = max(1, count // _CALIBRATION_IMAGES)
    images = []
    for load in itertools.islice(loaders, 0, _CALIBRATION_IMAGES * step, step):
      face = load()
      if isinstance(face, image_source.Unreadable):
        logging.warning("skipped %s: %s", face.path, face.reason)
      elif face.fit != "kept" or len(face.image) != image_size:
        raise errors.DataError(
          f"{flag}: {face.path} is not {image_size} x {image_size} pixels, as the "
          "network takes them; give images that are aligned as the training images."
        )
      else:
        images.append(face.image)
  if not images:
    raise errors.DataError(f"{flag} has no image that can be read; check the path.")
  return np.stack(images)


def export_saved_model(source: Source) -> None:
  """Writes the SavedModel, its facts and its card to a folder of their own."""
  settings, network = source.settings, source.network
  with storage.new_folder(settings.output, last=serving.MODEL_FILE) as folder:
    write_model(settings, network, folder)
    content = json.dumps(source.facts, indent=1) + "\n"
    storage.write_bytes(os.path.join(folder, FACTS_NAME), content.encode())
    embed = try_model(settings, network, folder)
    files = {
      each.path: os.path.join(folder, each.path)
      for each in storage.walk(folder)
      if each.path.startswith((serving.MODEL_FILE, "variables/"))
    }
    card = model_card_of(
      source, score(source, embed), usage=_SAVED_MODEL_USAGE, files=files, versions={}
    )
    storage.write_bytes(os.path.join(folder, CARD_NAME), card.encode())


def export_file(source: Source) -> None:
  """Writes the ONNX or TFLite file and its card.

  Raises:
    errors.DataError: The network embeds images as zero or as what is not finite, or
      8 bits are too few for it.
    RuntimeError: The file embeds otherwise than the network.
  """
  settings, network = source.settings, source.network
  # Else a GPU multiplies floats of 10 bits, and the file on a CPU those of 23.
  tf.config.experimental.enable_tensor_float_32_execution(False)
  with (
    storage.new_file(settings.output + CARD_SUFFIX, if_absent=True) as card_path,
    storage.new_file(settings.output, if_absent=True) as path,  # is there first
  ):
    served = _served(settings, network)
    if _suffix(settings) == ONNX:
      onnx_file.write(served, path, layout=settings.layout, facts=source.facts)
      embed = onnx_file.load(path, layout=settings.layout)
      usage = _ONNX_USAGE[settings.layout]
      versions = onnx_file.versions()
    else:
      images = () if source.calibration is None else source.calibration
      tflite_file.write(served, path, precision=settings.precision, calibration=images)
      embed = tflite_file.load(path)
      usage = _INT8_USAGE if settings.precision == "int8" else _TFLITE_USAGE
      versions = {}
    try_file(source, embed)
    card = model_card_of(
      source,
      score(source, embed),
      usage=usage,
      files={os.path.basename(settings.output): path},
      versions=versions,
    )
    storage.write_bytes(card_path, card.encode())


def try_file(source: Source, embed: Callable[[np.ndarray], np.ndarray]) -> None:
  """Compares the embeddings of a written file with the network's.

  Raises:
    errors.DataError: The network embeds images as zero or as what is not finite, or
      8 bits are too few for it.
    RuntimeError: The two differ.
  """
  settings, network = source.settings, source.network
  expected, found = _try(settings, network, embed, images=source.calibration)
  first = np.arange(len(expected))
  both = np.concatenate([expected, found])
  cosines = verification.cosine_scores(both, first, first + len(first))
  lengths = np.linalg.norm(expected, axis=1, keepdims=True)
  difference = float(np.abs((found - expected) / lengths).max())
  if settings.precision == "int8":
    logging.info(
      "cosine of int8 and float32 embeddings of %d calibration images: mean %.4f, "
      "least %.4f",
      len(first),
      cosines.mean(),
      cosines.min(),
    )
    if not cosines.mean() >= _MIN_MEAN_COSINE_INT8:
      raise errors.DataError(
        f"{network.name} in int8 embeds otherwise: mean cosine {cosines.mean():.3f} on "
        f"--calibration={settings.calibration}; use --precision=float16, or images "
        "like those of the training."
      )
  elif settings.precision == "float16":
    if not cosines.min() >= _MIN_COSINE_FLOAT16:
      raise RuntimeError(
        f"{settings.output} of {network.name} embeds otherwise than the run's network: "
        f"cosine {cosines.min():.4f} for the same image"
      )
  elif not difference <= _MAX_DIFFERENCE:
    raise RuntimeError(
      f"{settings.output} of {network.name} embeds otherwise than the run's network: "
      f"floats differ by up to {difference:.1e} of an embedding's length"
    )


def score(source: Source, embed: Callable[[np.ndarray], np.ndarray]) -> list[Row]:
  """Scores the exported model on the sets; prints a JSON line for each.

  Args:
    source: Has the sets.
    embed: Runs the model: uint8[n, S, S, 3] RGB images to float32[n, embedding]. If
      the model adds the mirror image, it does so here too.
  """
  rows = []
  facts = source.facts
  renamed = {"alignment": "training_alignment", "data_fingerprint": "training_data"}
  for each in source.sets:
    started = time.monotonic()
    embedder = Embedder(
      network=embed,
      network_name=source.settings.output,
      batch_size=_SCORED_AT_ONCE,
      mirror=False,
    )
    pixels = provenance.PixelChecksum()
    embeddings = evaluator.embed_set(embedder, each, pixels)
    _, result = evaluator.verify_set(each, embeddings)
    row = report.row(
      result,
      key_fields={
        "step": source.checkpoint.step,
        "set": each.name,
        "fingerprint": each.fingerprint,
        "mirrored": source.settings.mirror,
        "weights": source.network.weights,
      },
      checkpoint=source.checkpoint.name,
      images=each.num_images,
      seconds=time.monotonic() - started,
    )
    row["provenance"] = {
      **evaluator.set_provenance(each, pixels.text()),
      **{name: value for name, value in facts.items() if name not in renamed},
      **{renamed[name]: facts[name] for name in renamed},
      "exported": os.path.basename(source.settings.output),
      "batch_size": embedder.batch_size,
      **provenance.environment(),
    }
    logging.info("%s", report.line(row))
    print(json.dumps(row), flush=True)
    rows.append(row)
  return rows


def model_card_of(
  source: Source,
  model_rows: Sequence[Row],
  *,
  usage: str,
  files: Mapping[str, str],
  versions: Mapping[str, str],
) -> str:
  """Returns the Markdown of the model card.

  Args:
    source: What was exported.
    model_rows: Scores of the exported model itself.
    usage: How pixels go in and embeddings come out; one of the `_USAGE` texts.
    files: The local path of each file of the model, by the name on the card.
    versions: Of the libraries that wrote the model, besides TensorFlow.
  """
  facts, run = source.facts, checkpoints.load_config(source.settings.workdir)
  digests = {}
  for name, path in files.items():
    with open(path, "rb") as stream:
      digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
  usage = usage.format(
    side=facts["image_size"],
    size=facts["embedding_size"],
    name=os.path.basename(source.settings.output.rstrip("/")),
    length="each of length 1"
    if facts["normalized"]
    else "not scaled: divide each by its length before you compare",
  )
  if facts["mirrored"]:
    usage += "\n\nAn embedding is of the image plus its mirror image."
  return model_card.ModelCard(
    facts=facts,
    usage=usage,
    run=run,
    data=model_card.data_facts(run, source.checkpoint.marker()),
    rows=model_card.rows_of(
      source.settings.workdir, step=facts["step"], weights=facts["weights"]
    ),
    model_rows=model_rows,
    versions={"TensorFlow": tf.__version__, **versions},
    sha256=digests,
  ).markdown()


def check_folder(output: str) -> None:
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
  calibration: np.ndarray | None,
) -> dict[str, Any]:
  """Returns the facts that are written with the model."""
  marker = checkpoint.marker()
  facts = inference.network_facts(
    network, checkpoint, normalize=_normalizes(settings), mirror=settings.mirror
  )
  of_format: dict[str, dict[str, Any]] = {
    ONNX: {"opset": onnx_file.OPSET, "layout": settings.layout},
    TFLITE: {"precision": settings.precision},
  }
  if calibration is not None:
    of_format[TFLITE]["calibration_images"] = len(calibration)
  return facts | {
    "channels": "RGB",
    "policy": network.policy,
    "data_fingerprint": marker.get("data_fingerprint"),
    "alignment": marker.get("alignment"),  # older markers do not say
    **of_format.get(
      _suffix(settings),
      {"signatures": [serving.PIXELS_SIGNATURE, serving.ENCODED_SIGNATURE]},
    ),
    "tool_version": __version__,
  }


def write_model(
  settings: ExportConfig, network: inference.InferenceNetwork, folder: str
) -> None:
  """Writes the SavedModel to a local folder.

  Raises:
    errors.DataError: TensorFlow cannot write it; the disk is full, most likely.
  """
  try:
    _served(settings, network).save(folder)
  except tf.errors.OpError as error:
    reason = errors.first_line(error).rpartition("}} ")[2]
    raise errors.DataError(
      f"--output={settings.output} cannot be written ({reason}); free space on its "
      "disk or choose another folder."
    ) from error


def try_model(
  settings: ExportConfig, network: inference.InferenceNetwork, folder: str
) -> Callable[[np.ndarray], np.ndarray]:
  """Loads the written model and compares its embeddings with the network's.

  Returns:
    The model: uint8[n, S, S, 3] RGB images to float32[n, embedding].

  Raises:
    errors.DataError: The network embeds images as zero or as what is not finite.
    RuntimeError: The two differ.
  """
  with storage.plain_name(folder) as plain:
    serve = tf.saved_model.load(plain).signatures[serving.PIXELS_SIGNATURE]

  def embed(images: np.ndarray) -> np.ndarray:
    return serve(images=tf.constant(images))["embeddings"].numpy()

  expected, found = _try(settings, network, embed)
  first = np.arange(_PROBES)
  both = np.concatenate([expected, found])
  cosines = verification.cosine_scores(both, first, first + _PROBES)
  if not cosines.min() >= _MIN_COSINE:
    raise RuntimeError(
      f"the SavedModel of {network.name} embeds otherwise than the run's network: "
      f"cosine {cosines.min():.3f} for the same image"
    )
  return embed


def _try(
  settings: ExportConfig,
  network: inference.InferenceNetwork,
  exported: Callable[[np.ndarray], np.ndarray],
  images: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns float32[images, embedding]: the network's, and the exported model's.

  Args:
    settings: The flags.
    network: What was exported.
    exported: The model.
    images: uint8[images, S, S, 3] RGB; random ones if not given.
  """
  side = network.image_size
  if images is None:
    shape = (_PROBES, side, side, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  embedder = Embedder(
    network=network.embed,
    network_name=network.name,
    batch_size=_SCORED_AT_ONCE,
    mirror=settings.mirror,
    normalize=_normalizes(settings),
  )
  parts = np.split(images, range(_SCORED_AT_ONCE, len(images), _SCORED_AT_ONCE))
  expected = [
    embedder.embed(part, [f"image {n}" for n in range(len(part))]) for part in parts
  ]
  return np.concatenate(expected), exported(images)


def _served(
  settings: ExportConfig, network: inference.InferenceNetwork
) -> serving.ServedNetwork:
  """Returns the computation that is exported."""
  return serving.ServedNetwork(
    network=network.network.embed,
    variables=network.variables,
    image_size=network.image_size,
    mirror=settings.mirror,
    normalize=_normalizes(settings),
  )


def _normalizes(settings: ExportConfig) -> bool:
  """Says whether the model scales embeddings to length 1; in int8 it cannot."""
  return settings.normalize and settings.precision != "int8"


def _suffix(settings: ExportConfig) -> str:
  """Returns the output's suffix in lower case, such as .onnx."""
  return os.path.splitext(settings.output)[1].lower()


def run() -> None:
  """Runs the command line."""
  config.run_command(main, ExportConfig)


if __name__ == "__main__":
  run()
