"""Measures the training input against bare decoding and against TFRecordDataset.

  python -m benchmarks.input_pipeline --data_dir=FOLDER_OF_112x112_JPEGS

Three sides take turns on the same JPEGs, each with as many threads as there are cores:

- libjpeg-turbo alone: threads that decode JPEGs in memory into one buffer each;
- a tuned TFRecordDataset: interleaved shards, a shuffle buffer, a parallel map that
  parses and decodes, batches, prefetching, all of it autotuned; with either DCT;
- facedist: the shuffled order, reads by index with CRC checks, whole-batch decoding,
  augmentation's draws and the hand-over to TensorFlow.

facedist should reach 0.8 of the first and twice the second. The first and the last
decode with the same settings, the accurate DCT and smooth upsampling.
"""

import dataclasses
import functools
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterator

import numpy as np
import simplejpeg
import tensorflow as tf
from absl import logging

from benchmarks import timing
from facedist import config, errors
from facedist.config import setting
from facedist.data import noise, pipeline
from facedist.data.readers import local_reader
from facedist.data.readers.record_reader import RecordReader
from facedist.data.samplers import epoch_sampler
from facedist.data.shards import manifest, tfrecord

IMAGE_SIZE = 112
REAL_DATA = "FACEDIST_REAL_DATA"
SHUFFLE_BUFFER = 2048
SHARDS = 16
DECODING = "libjpeg-turbo alone"
FACEDIST = "facedist"
TFRECORD = "TFRecordDataset"


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Sizes of the measurement."""

  data_dir: str | None = setting(
    None,
    help=f"Folder of 112x112 JPEGs. Default ${REAL_DATA}/lfw/aligned_112, or else "
    "random patterns.",
    path=True,
  )
  batch: int = setting(128, help="Images per batch, as for one GPU.", at_least=1)
  batches: int = setting(48, help="Batches per round of each side.", at_least=1)
  rounds: int = setting(9, help="Rounds of each side.", at_least=1)
  images: int = setting(8192, help="Largest number of images to use.", at_least=1)


def run(settings: BenchmarkConfig) -> dict[str, float]:
  """Measures all sides; returns images a second by name, and the two ratios."""
  with tempfile.TemporaryDirectory() as folder:
    origin = _write_shards(folder, settings)
    shards = local_reader.open_reader(folder, "train")
    jpegs, _ = shards.read(np.arange(shards.num_records))
    logging.info(
      "%d images (%s) of %.1f kB; %d threads each",
      len(jpegs),
      origin,
      np.mean([len(jpeg) for jpeg in jpegs]) / 1000,
      _threads(),
    )
    decoding = functools.partial(_decode, jpegs, settings.batch * settings.batches)
    datasets = {
      FACEDIST: _Dataset(_facedist(shards, settings.batch), settings.batches),
      f"{TFRECORD}, accurate DCT": _Dataset(
        _tfrecord(folder, settings.batch, "INTEGER_ACCURATE"), settings.batches
      ),
      f"{TFRECORD}, fast DCT": _Dataset(
        _tfrecord(folder, settings.batch, "INTEGER_FAST"), settings.batches
      ),
    }
    seconds = timing.interleaved(
      {DECODING: decoding} | {name: side.take for name, side in datasets.items()},
      rounds=settings.rounds,
      before={name: side.start for name, side in datasets.items()},
      title="input_pipeline",
    )
  rates = {
    name: settings.batch * settings.batches / time for name, time in seconds.items()
  }
  tfrecord = max(rate for name, rate in rates.items() if name.startswith(TFRECORD))
  return rates | {
    f"{FACEDIST} / {DECODING}": rates[FACEDIST] / rates[DECODING],
    f"{FACEDIST} / {TFRECORD}": rates[FACEDIST] / tfrecord,
  }


class _Dataset:
  """A data set whose batches are timed once it is under way."""

  def __init__(self, dataset: tf.data.Dataset, batches: int):
    self._dataset, self._batches = dataset, batches
    self._iterator: Iterator | None = None

    @tf.function  # as the trainer's inner loop takes them
    def take(iterator: Iterator, count: tf.Tensor) -> None:
      for _ in tf.range(count):
        next(iterator)

    self._take = take

  def start(self) -> None:
    """Starts afresh; the first batches fill buffers and are not timed."""
    self._iterator = iter(self._dataset)
    self._take(self._iterator, tf.constant(2))

  def take(self) -> None:
    """Takes the batches that are timed, then stops what works ahead."""
    self._take(self._iterator, tf.constant(self._batches))
    self._iterator = None


def _write_shards(folder: str, settings: BenchmarkConfig) -> str:
  """Writes the images as a training split; says where they come from."""
  source = settings.data_dir
  if source is None and os.environ.get(REAL_DATA):
    source = os.path.join(os.environ[REAL_DATA], "lfw", "aligned_112")
  described = noise.write_noise_shards(
    folder,
    num_identities=64,
    images_per_identity=1 if source else -(-min(settings.images, 2048) // 64),
    val_images_per_identity=0,
    image_size=IMAGE_SIZE,
    num_shards=SHARDS,
    seed=0,
  )
  if source is None:
    return f"random patterns, as ${REAL_DATA} is not set"
  paths = sorted(pathlib.Path(source).rglob("*.jpg"))[: settings.images]
  if not paths:
    raise errors.DataError(f"{source} holds no .jpg files; name another --data_dir.")
  content = [
    tfrecord.Record(path.read_bytes(), number % 64, path.parent.name, path.name)
    for number, path in enumerate(paths)
  ]
  split = noise.write_split(folder, "train", content, num_shards=SHARDS)
  manifest.save(dataclasses.replace(described, splits={"train": split}), folder)
  return source


def _threads() -> int:
  """As many threads as this process may use cores."""
  return len(os.sched_getaffinity(0))


def _decode(jpegs: list[bytes], count: int) -> None:
  """Decodes `count` images in threads, each into a buffer that it uses again."""

  def decode(first: int) -> None:
    buffer = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for number in range(first, count, _threads()):
      simplejpeg.decode_jpeg(jpegs[number % len(jpegs)], "RGB", buffer=buffer)

  threads = [threading.Thread(target=decode, args=(n,)) for n in range(_threads())]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()


def _facedist(shards: RecordReader, batch: int) -> tf.data.Dataset:
  """The input of facedist.train on one worker."""
  return pipeline.training_dataset(
    shards,
    epoch_sampler.EpochSampler(shards.num_records, batch, seed=0),
    seed=0,
    num_threads=_threads(),
  )


def _tfrecord(folder: str, batch: int, dct_method: str) -> tf.data.Dataset:
  """The input that TensorFlow's guide to tf.data performance leads to."""
  features = {
    tfrecord.IMAGE: tf.io.FixedLenFeature([], tf.string),
    tfrecord.LABEL: tf.io.FixedLenFeature([], tf.int64),
  }

  def decode(payload: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    example = tf.io.parse_single_example(payload, features)
    image = tf.io.decode_jpeg(example[tfrecord.IMAGE], 3, dct_method=dct_method)
    return tf.ensure_shape(image, [IMAGE_SIZE] * 2 + [3]), example[tfrecord.LABEL]

  options = tf.data.Options()
  options.deterministic = False
  options.threading.private_threadpool_size = _threads()
  return (
    tf.data.Dataset.list_files(os.path.join(folder, "train-*.tfrecord"))
    .repeat()
    .interleave(tf.data.TFRecordDataset, num_parallel_calls=tf.data.AUTOTUNE)
    .shuffle(SHUFFLE_BUFFER)
    .map(decode, num_parallel_calls=tf.data.AUTOTUNE)
    .batch(batch, drop_remainder=True)
    .prefetch(tf.data.AUTOTUNE)
    .with_options(options)
  )


def main(settings: BenchmarkConfig) -> None:
  """Prints the rates and the ratios as a table."""
  results = run(settings)
  logging.info(
    "%s; %d rounds of %d batches of %d, medians",
    timing.machine(),
    settings.rounds,
    settings.batches,
    settings.batch,
  )
  for name, value in results.items():
    print(f"{name:40s} {value:9.2f}" if value < 100 else f"{name:40s} {value:6.0f} /s")


if __name__ == "__main__":
  config.run_command(main, BenchmarkConfig)
