"""What a report shows of one score beside its figures, kept in a small file.

`WORKDIR/evaluation/step-00000100_lfw_1a2b3c4d.npz` holds, for one checkpoint and one
verification set, the score of every pair, the false accepts and false rejects that are
furthest from the threshold with their images, and a map of some identities. So the
report can be drawn at any time, without the set and without the network. The hex digits
are of the fields that identify the score.
"""

import dataclasses
import io
import itertools
import json
import re
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
import simplejpeg

from facedist import errors, storage
from facedist.data.shards import shard_index
from facedist.evaluation.score_log import Row, ScoreLog

FOLDER = "evaluation"
MAX_HARDEST = 8
MAP_IDENTITIES = 24
MAP_IMAGES = 12  # of each identity
MAP_COMPONENTS = 32  # with those of LFW, as many nearest neighbours are right as in all
_QUALITY = 85
_FORMAT_VERSION = 1
_NOT_OF_THIS_FORMAT = (
  *(ValueError, KeyError, TypeError, OSError, EOFError),
  *(zipfile.BadZipFile, zlib.error),
)


@dataclasses.dataclass(frozen=True)
class HardPair:
  """A pair on the wrong side of the threshold.

  Attributes:
    score: Its cosine.
    names: The names of its two images, empty where they have none.
    jpegs: The two images, encoded.
  """

  score: float
  names: tuple[str, str]
  jpegs: tuple[bytes, bytes]


@dataclasses.dataclass(frozen=True)
class ScoreDetails:
  """One checkpoint's pairs of one verification set.

  Attributes:
    key: The fields of `ScoreLog.KEY`.
    threshold: The mean of the folds' thresholds; a pair is accepted from it on.
    scores: float32[pairs] cosines.
    same: bool[pairs].
    false_accepts: The different pairs with the highest cosines that are accepted.
    false_rejects: The same pairs with the lowest cosines that are not.
    map_points: float32[points, components], see `map_points`; no points where the set
      names no identities.
    map_labels: int64[points], the identity of each point.
  """

  key: Row
  threshold: float
  scores: np.ndarray
  same: np.ndarray
  false_accepts: tuple[HardPair, ...]
  false_rejects: tuple[HardPair, ...]
  map_points: np.ndarray
  map_labels: np.ndarray


def hardest(
  scores: np.ndarray, same: np.ndarray, threshold: float, *, count: int = MAX_HARDEST
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the pairs that are furthest on the wrong side of the threshold.

  Args:
    scores: float64[pairs].
    same: bool[pairs].
    threshold: A pair is accepted where `score >= threshold`.
    count: Largest number of each.

  Returns:
    int64[up to count] each: false accepts by falling score, and false rejects by rising
    score; of equal scores the first pair comes first.
  """
  accepts = np.flatnonzero(~same & (scores >= threshold))
  rejects = np.flatnonzero(same & (scores < threshold))
  return (
    accepts[np.argsort(-scores[accepts], kind="stable")][:count],
    rejects[np.argsort(scores[rejects], kind="stable")][:count],
  )


def map_points(
  embeddings: np.ndarray, labels: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns what a map of the identities with the most images is drawn from.

  Those are the first MAP_IMAGES images of MAP_IDENTITIES identities.

  Args:
    embeddings: float32[images, embedding], of length 1.
    labels: int[images], the identity of each image; None if not known.

  Returns:
    float32[points, up to MAP_COMPONENTS], the principal components of their embeddings
    (PCA), and int64[points], the identity of each; no points where fewer than three
    identities are known to have two images.
  """
  if labels is None:
    labels = np.zeros(0, np.int64)
  identities, counts = np.unique(labels, return_counts=True)
  order = np.argsort(-counts, kind="stable")[:MAP_IDENTITIES]
  chosen = [np.flatnonzero(labels == each) for each in identities[order]]
  chosen = [places[:MAP_IMAGES] for places in chosen if len(places) > 1]
  if len(chosen) < 3:
    return np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
  places = np.concatenate(chosen)
  centred = embeddings[places] - embeddings[places].mean(axis=0)
  axes = np.linalg.svd(centred, full_matrices=False)[2][:MAP_COMPONENTS]
  # the sign of a component is arbitrary, so that two steps could be mirrored
  largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, np.newaxis], axis=1)
  points = centred @ (axes * np.sign(largest)).T
  return points.astype(np.float32), labels[places].astype(np.int64)


def encode(image: np.ndarray) -> bytes:
  """Returns the JPEG of a uint8[height, width, 3] RGB image."""
  pixels = np.ascontiguousarray(image)
  return bytes(simplejpeg.encode_jpeg(pixels, quality=_QUALITY))


def path_of(workdir: str, key: Row) -> str:
  """Returns the file of the details with that key."""
  name = re.sub(r"[^\w.-]", "-", key["set"], flags=re.ASCII)
  digits = storage.crc32c_of(json.dumps(ScoreLog.key(key)).encode())
  return storage.join(
    workdir, FOLDER, f"step-{key['step']:08d}_{name}_{digits:08x}.npz"
  )


def save(details: ScoreDetails, workdir: str) -> None:
  """Writes the details to their file, at once; replaces those of the same key."""
  pairs = [*details.false_accepts, *details.false_rejects]
  jpegs = [jpeg for pair in pairs for jpeg in pair.jpegs]
  text = {
    "format_version": _FORMAT_VERSION,
    "key": details.key,
    "threshold": details.threshold,
    "num_false_accepts": len(details.false_accepts),
    "pairs": [{"score": pair.score, "names": pair.names} for pair in pairs],
    "jpeg_bytes": [len(jpeg) for jpeg in jpegs],
  }
  stream = io.BytesIO()
  np.savez_compressed(
    stream,
    text=np.frombuffer(json.dumps(text).encode(), np.uint8),
    jpegs=np.frombuffer(b"".join(jpegs), np.uint8),
    scores=details.scores.astype(np.float32),
    same=details.same,
    map_points=details.map_points,
    map_labels=details.map_labels,
  )
  storage.write_bytes(path_of(workdir, details.key), stream.getvalue())


def load(path: str) -> ScoreDetails:
  """Reads a file that `save` wrote.

  Raises:
    errors.DataError: There is no such file, or it is none of this version's.
  """
  content = storage.read_bytes(path)
  try:
    with (
      shard_index.HEADER_PARSER,  # the report's thread reads beside the evaluator's
      np.load(io.BytesIO(content), allow_pickle=False) as arrays,
    ):
      text = json.loads(arrays["text"].tobytes())
      if text["format_version"] != _FORMAT_VERSION:
        raise ValueError(f"format_version is {text['format_version']}")
      ends = np.cumsum([0, *text["jpeg_bytes"]])
      jpegs = [
        arrays["jpegs"][start:end].tobytes() for start, end in itertools.pairwise(ends)
      ]
      pairs = tuple(
        HardPair(pair["score"], (*pair["names"],), (first, second))
        for pair, first, second in zip(
          text["pairs"], jpegs[::2], jpegs[1::2], strict=True
        )
      )
      return ScoreDetails(
        key=text["key"],
        threshold=text["threshold"],
        scores=arrays["scores"],
        same=arrays["same"],
        false_accepts=pairs[: text["num_false_accepts"]],
        false_rejects=pairs[text["num_false_accepts"] :],
        map_points=arrays["map_points"],
        map_labels=arrays["map_labels"],
      )
  except _NOT_OF_THIS_FORMAT as error:
    raise errors.DataError(
      f"{path} holds no details of a score ({errors.first_line(error)}); remove it, "
      "and the report leaves them out."
    ) from error


def find(workdir: str, rows: Sequence[Row]) -> dict[int, str]:
  """Returns the files of those rows that have one, by the row's place in `rows`."""
  names = set(storage.list_names(storage.join(workdir, FOLDER)))
  paths = {place: path_of(workdir, row) for place, row in enumerate(rows)}
  return {
    place: path
    for place, path in paths.items()
    if path.rsplit("/", maxsplit=1)[-1] in names
  }
