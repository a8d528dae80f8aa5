"""Template protocols: IJB-B and IJB-C, 1:1 and 1:N, and TinyFace's search.

A template is a set of images of one person. IJB-B (Whitelam et al., CVPRW 2017) and
IJB-C (Maze et al., ICB 2018) are read as InsightFace's evaluation lays them out:

  loose_crop/NAME                     the images
  meta/ijbc_name_5pts_score.txt       NAME, five points x y in pixels, the face score
  meta/ijbc_face_tid_mid.txt          NAME, template, medium (a photo or a video)
  meta/ijbc_template_pair_label.txt   template, template, 1 for one person or 0
  meta/ijbc_1N_gallery_G1.csv, G2     template, subject, ...; after a line of titles
  meta/ijbc_1N_probe_mixed.csv        the same; IJB-B's galleries are S1 and S2

Fields of .txt are separated by spaces or tabs. TinyFace (Cheng, Zhu and Gong, ACCV
2018) is a folder with Probe, Gallery_Match and Gallery_Distractor.

Pooling, scores and figures are functions of NumPy arrays.
"""

import csv
import dataclasses
import functools
import math
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging

from facedist import errors, storage
from facedist.data import image_source
from facedist.data.image_names import NameFilter
from facedist.evaluation import identification, verification

FPIR_LIMITS = (0.1, 0.01)
RANKS = (1, 5, 10)
_GALLERIES = ("G1", "G2", "S1", "S2")
_IMAGES_AT_ONCE = 4096  # of a pooling step, plus those of one template
_SCORES_AT_ONCE = 1 << 23  # of probes with the gallery
_WASTE = 64  # cosines computed in vain for each that is needed, at most
_INTEGER = re.compile(r"[+-]?\d{1,18}")


@dataclasses.dataclass(frozen=True)
class Gallery:
  """Templates of a search.

  Attributes:
    name: G1, G2, S1, S2 or probe.
    places: int64[templates], places in `IjbSet.templates`.
    subjects: int64[templates].
  """

  name: str
  places: np.ndarray
  subjects: np.ndarray


@dataclasses.dataclass(frozen=True)
class IjbSet:
  """The lists of IJB-B or IJB-C.

  Attributes:
    names: File name of each image that is in a template.
    landmarks: float64[images, 5, 2], x and y in pixels of the loose crop.
    face_scores: float64[images], of the face detector.
    image_of: int64[rows], image of each line of face_tid_mid.
    template_of: int64[rows], its template, a place in `templates`.
    medium_of: int64[rows], its medium.
    templates: int64[templates], the protocol's numbers, rising.
    first: int32[pairs], places in `templates`.
    second: int32[pairs], places in `templates`.
    same: bool[pairs], whether the two are of one person.
    galleries: The galleries of 1:N; empty if its files are not there.
    probes: The probes of 1:N.
    subject_of: int64[templates], from the files of 1:N; -1 where not known.
  """

  names: list[str]
  landmarks: np.ndarray
  face_scores: np.ndarray
  image_of: np.ndarray
  template_of: np.ndarray
  medium_of: np.ndarray
  templates: np.ndarray
  first: np.ndarray
  second: np.ndarray
  same: np.ndarray
  galleries: tuple[Gallery, ...]
  probes: Gallery | None
  subject_of: np.ndarray


@dataclasses.dataclass(frozen=True)
class TinyFaceSet:
  """The lists of TinyFace.

  Attributes:
    names: Paths of all images below the folder: the matching gallery, the distractors,
      then the probes.
    identities: int64[images]; -1 for a distractor.
    num_gallery: Images of the gallery, distractors included; the others are probes.
  """

  names: list[str]
  identities: np.ndarray
  num_gallery: int


@dataclasses.dataclass(frozen=True)
class TemplateTar:
  """The true accept rate of pairs of templates at one false accept rate.

  Attributes:
    far: The false accept rate asked for.
    tar: Largest true accept rate with at most that false accept rate.
    low: Lower end of its 95 % interval over subjects; None where they are not known.
    high: Upper end.
    threshold: Lowest cosine accepted; 2 where none is.
    nearest_tar: The true accept rate as InsightFace's ijb_11.py reads it: at the corner
      of the ROC curve whose false accept rate is nearest, which may be above `far`.
    nearest_far: The false accept rate of that corner.
  """

  far: float
  tar: float
  low: float | None
  high: float | None
  threshold: float
  nearest_tar: float
  nearest_far: float


@dataclasses.dataclass(frozen=True)
class TemplateVerification:
  """Figures of the 1:1 protocol.

  Attributes:
    num_same: Pairs of one person.
    num_different: Pairs of two.
    auc: Area under the ROC curve.
    eer: Equal error rate.
    tar_at_far: At each of `verification.FAR_LIMITS` that is at least 1 / num_different.
  """

  num_same: int
  num_different: int
  auc: float
  eer: float
  tar_at_far: tuple[TemplateTar, ...]


@dataclasses.dataclass(frozen=True)
class OpenSet:
  """The open set of one gallery: probes with a mate in it, and probes without.

  Attributes:
    gallery: Its name.
    num_mated: Probes whose subject is in the gallery.
    num_unmated: Probes whose subject is not.
    tpir_at_fpir: The fraction of mated probes that are found at rank 1 and accepted,
      where at most the fraction `fpir` of unmated probes is accepted; 1 - FNIR.
  """

  gallery: str
  num_mated: int
  num_unmated: int
  tpir_at_fpir: tuple[identification.TpirAtFpir, ...]


@dataclasses.dataclass(frozen=True)
class TemplateIdentification:
  """Figures of the 1:N protocol.

  Attributes:
    num_probes: Probes whose subject is in a gallery.
    num_subjects: Subjects of all galleries together.
    rank_1: Fraction of probes found at rank 1 in all galleries together.
    rank_5: Fraction of probes found at rank 5 or better.
    rank_10: Fraction of probes found at rank 10 or better.
    open_sets: The open set of each gallery alone.
    tpir_at_fpir: The mean over the galleries.
    pairwise_tpir_at_fpir: As InsightFace's ijb_1n.py computes it, in all galleries
      together: the threshold is the ceil(fpir * probes)-th highest cosine of all pairs
      of a probe and another subject's template, and a probe is found if the cosine with
      its mate is above it, at any rank.
  """

  num_probes: int
  num_subjects: int
  rank_1: float
  rank_5: float
  rank_10: float
  open_sets: tuple[OpenSet, ...]
  tpir_at_fpir: tuple[identification.TpirAtFpir, ...]
  pairwise_tpir_at_fpir: tuple[identification.TpirAtFpir, ...]


@dataclasses.dataclass(frozen=True)
class ImageSearch:
  """Figures of TinyFace's search.

  Attributes:
    num_probes: Number of probes.
    num_gallery: Images of the gallery, distractors included.
    rank_1: Fraction of probes whose best image of the gallery is of their identity.
    rank_5: Fraction with one of their identity among the five best.
    cmc: Fractions for ranks 1 to 20.
  """

  num_probes: int
  num_gallery: int
  rank_1: float
  rank_5: float
  cmc: tuple[float, ...]


def read_ijb(folder: str, protocol: str) -> IjbSet:
  """Reads the lists of IJB-B or IJB-C; opens no image.

  Args:
    folder: It has `meta`; local or in a bucket.
    protocol: ijbb or ijbc.

  Raises:
    errors.DataError: A list is missing, a line is not as it must be, names an image
      without points or a template without images, or the files of 1:N are not complete.
  """

  def meta(name: str) -> str:
    return storage.join(folder, "meta", f"{protocol}_{name}")

  points = _read_points(meta("name_5pts_score.txt"))
  path = meta("face_tid_mid.txt")
  rows = []
  images: dict[str, int] = {}
  for number, fields in _fields(path, "image, template and medium", count=3):
    name, *numbers = fields
    if name not in points:
      raise errors.DataError(
        f"{path}, line {number}, names {name}, which is not in "
        f"{meta('name_5pts_score.txt')}; take both lists from one release."
      )
    template, medium = (_integer(each, path, number) for each in numbers)
    rows.append((images.setdefault(name, len(images)), template, medium))
  image_of, numbers, medium_of = np.array(rows, np.int64).T
  templates, template_of = np.unique(numbers, return_inverse=True)
  first, second, same = _read_pairs(meta("template_pair_label.txt"), templates, path)
  of_images = np.array([points[name] for name in images])
  galleries, probes = _read_searches(meta, templates)
  subject_of = np.full(len(templates), -1)
  for each in (*galleries, *([probes] if probes else [])):
    subject_of[each.places] = each.subjects
  return IjbSet(
    names=list(images),
    landmarks=of_images[:, :10].reshape(-1, 5, 2),
    face_scores=of_images[:, 10],
    image_of=image_of,
    template_of=template_of,
    medium_of=medium_of,
    templates=templates,
    first=first,
    second=second,
    same=same,
    galleries=galleries,
    probes=probes,
    subject_of=subject_of,
  )


def read_tinyface(folder: str) -> TinyFaceSet:
  """Lists TinyFace's test images.

  Identities are those of gallery_match_img_ID_pairs.mat and probe_img_ID_pairs.mat,
  which name the images of the protocol. Where neither is there, all images count, and
  an identity is what precedes the first _ of a file name, as in 12_3.jpg.

  Args:
    folder: It has Probe, Gallery_Match and Gallery_Distractor, or a folder Testing_Set
      that has them; local or in a bucket.

  Raises:
    errors.DataError: A folder has no image, a list is not as it must be or names an
      image that is not there, or a file name has no identity.
  """
  below = "" if storage.list_names(storage.join(folder, "Probe")) else "Testing_Set/"
  listed = {}
  for part in ("Gallery_Match", "Gallery_Distractor", "Probe"):
    place = storage.join(folder, below + part)
    if storage.list_names(place):
      listed[part] = list(image_source.image_paths(place, NameFilter()))
    if not listed.get(part):
      raise errors.DataError(
        f"{folder} has no images in {part}; give the folder with Probe, Gallery_Match "
        "and Gallery_Distractor, or the one with Testing_Set."
      )
  lists = [
    storage.join(folder, below + f"{name}_img_ID_pairs.mat")
    for name in ("gallery_match", "probe")
  ]
  if any(map(storage.exists, lists)):
    gallery = _read_mat(lists[0], "gallery", listed["Gallery_Match"])
    probes = _read_mat(lists[1], "probe", listed["Probe"])
  else:
    gallery = [(each, _identity(each)) for each in listed["Gallery_Match"]]
    probes = [(each, _identity(each)) for each in listed["Probe"]]
  images = [(f"{below}Gallery_Match/{name}", number) for name, number in gallery]
  images += [
    (f"{below}Gallery_Distractor/{name}", -1) for name in listed["Gallery_Distractor"]
  ]
  num_gallery = len(images)
  images += [(f"{below}Probe/{name}", number) for name, number in probes]
  names, identities = zip(*images, strict=True)
  return TinyFaceSet(list(names), np.array(identities, np.int64), num_gallery)


def crc32c(lists: IjbSet | TinyFaceSet) -> str:
  """Returns eight hex digits that identify what was read from the lists."""

  def contents(value: object) -> Iterator[bytes]:
    """Yields the bytes of a value, part by part."""
    if isinstance(value, np.ndarray):
      yield value.tobytes()
    elif isinstance(value, tuple):
      for each in value:
        yield from contents(each)
    elif dataclasses.is_dataclass(value):
      for field in dataclasses.fields(value):
        yield from contents(getattr(value, field.name))
    else:
      yield repr(value).encode()

  checksum = functools.reduce(storage.extend_crc32c, contents(lists), 0)
  return f"{checksum:08x}"


def pool(
  embeddings: np.ndarray,
  templates: np.ndarray,
  media: np.ndarray,
  *,
  weights: np.ndarray | None = None,
  use_norms: bool = True,
  rows: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the embedding of each template.

  The embeddings of a medium's images in the template are averaged, each times its
  weight; the means of the media are averaged; the result is scaled to length 1. An
  embedding that keeps its length is weighted by it. The weights are not divided by
  their sum. This is InsightFace's ijb_11.py, which adds the media up instead: the
  same after scaling. A medium that is in two templates is averaged in each by itself.

  Args:
    embeddings: float32[images, embedding], raw.
    templates: int[rows].
    media: int[rows]; one number in two templates is no link between them.
    weights: float[rows], such as face scores.
    use_norms: Whether an embedding keeps its length; else it is scaled to 1 first.
    rows: int[rows], the image of each row; None if they are the images themselves.

  Returns:
    int64[templates], the numbers in `templates`, rising, and float64[templates,
    embedding] of length 1.

  Raises:
    errors.DataError: A template's sum is zero or not finite.
  """
  order = np.lexsort((media, templates))
  templates, media = templates[order], media[order]
  is_new = np.append(True, templates[1:] != templates[:-1])
  starts = np.flatnonzero(is_new)
  medium_starts = np.flatnonzero(is_new | np.append(True, media[1:] != media[:-1]))
  pooled = np.empty((len(starts), embeddings.shape[1]))
  ends = np.append(starts[1:], len(order))
  begin = 0
  while begin < len(starts):
    # as many whole templates as fit, but at least one
    end = np.searchsorted(ends, starts[begin] + _IMAGES_AT_ONCE, side="right")
    end = max(begin + 1, int(end))
    low, high = starts[begin], ends[end - 1]
    some = order[low:high]
    images = embeddings[some if rows is None else rows[some]].astype(np.float64)
    if not use_norms:
      images /= np.linalg.norm(images, axis=1, keepdims=True)
    if weights is not None:
      images *= weights[some, np.newaxis]
    of_media = medium_starts[
      np.searchsorted(medium_starts, low) : np.searchsorted(medium_starts, high)
    ]
    means = np.add.reduceat(images, of_media - low, axis=0)
    means /= np.diff(np.append(of_media, high))[:, np.newaxis]
    media_before = np.searchsorted(of_media, starts[begin:end])
    sums = np.add.reduceat(means, media_before, axis=0)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    broken = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
    if len(broken):
      raise errors.DataError(
        f"the embeddings of template {templates[starts[begin + broken[0]]]} add up to "
        "a vector that is zero or not finite; look at its images' weights."
      )
    pooled[begin:end] = sums / lengths
    begin = end
  return templates[starts], pooled


def pair_scores(
  pooled: np.ndarray, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
  """Returns the cosine of each pair of templates.

  The pairs of IJB are a large part of all pairs of their templates, so a product of
  matrices, block by block, is ten times as fast as a product for each pair.

  Args:
    pooled: float64[templates, embedding] of length 1.
    first: int32[pairs], places in `pooled`.
    second: int32[pairs], places in `pooled`.

  Returns:
    float64[pairs] in [-1, 1].
  """
  rows = np.flatnonzero(np.bincount(first, minlength=len(pooled)))
  columns = np.flatnonzero(np.bincount(second, minlength=len(pooled)))
  if len(rows) * len(columns) > _WASTE * len(first):
    return verification.cosine_scores(pooled, first, second)
  column_of = np.zeros(len(pooled), np.int32)
  column_of[columns] = np.arange(len(columns))
  order = np.argsort(first, kind="stable")
  ordered = first[order]
  scores = np.empty(len(first))
  at_once = max(1, _SCORES_AT_ONCE // len(columns))
  for start in range(0, len(rows), at_once):
    some = rows[start : start + at_once]
    low = np.searchsorted(ordered, some[0])
    high = np.searchsorted(ordered, some[-1], side="right")
    pairs = order[low:high]
    row_of = np.searchsorted(some, ordered[low:high])
    products = pooled[some] @ pooled[columns].T
    scores[pairs] = products[row_of, column_of[second[pairs]]]
  return np.clip(scores, -1.0, 1.0, out=scores)


def verify(
  scores: np.ndarray,
  same: np.ndarray,
  *,
  subjects: np.ndarray | None = None,
  resamples: int = verification.RESAMPLES,
) -> TemplateVerification:
  """Returns the figures of the 1:1 protocol.

  Args:
    scores: float64[pairs].
    same: bool[pairs].
    subjects: int[pairs, 2], whose bootstrap gives the intervals; None if not known.
    resamples: Resamples of the bootstrap.

  Raises:
    errors.DataError: There are pairs of one kind only.
  """
  from sklearn import metrics  # a second that training does without

  num_same = int(np.count_nonzero(same))
  num_different = len(same) - num_same
  if not num_same or not num_different:
    raise errors.DataError(
      f"the protocol has {num_same} pairs of one person and {num_different} of two; "
      "it needs both."
    )
  far, tar, _ = metrics.roc_curve(same, scores)
  falling_same = np.flatnonzero(same)[np.argsort(-scores[same])]
  falling = np.flatnonzero(~same)
  falling = falling[np.argsort(-scores[falling])]
  limits = verification.supported_limits(num_different)
  intervals: list[tuple[float | None, float | None]] = [(None, None)] * len(limits)
  if subjects is not None and limits and resamples:
    logging.info("resampling the subjects %d times for the intervals", resamples)
    tars = _resampled_tars(
      scores, falling_same, falling, subjects, limits, resamples=resamples
    )
    if len(tars):
      ends = np.percentile(tars, verification.INTERVAL, axis=0).T
      intervals = [(float(low), float(high)) for low, high in ends]
  points = []
  for limit, interval in zip(limits, intervals, strict=True):
    refused = scores[falling[_num_allowed(limit, num_different)]]
    accepted = scores[scores > refused]
    # of equally near corners the last, as in the reversed curve of ijb_11.py
    nearest = len(far) - 1 - int(np.argmin(np.abs(far - limit)[::-1]))
    points.append(
      TemplateTar(
        limit,
        float(np.mean(scores[falling_same] > refused)),
        *interval,
        threshold=float(accepted.min()) if len(accepted) else 2.0,
        nearest_tar=float(tar[nearest]),
        nearest_far=float(far[nearest]),
      )
    )
  return TemplateVerification(
    num_same=num_same,
    num_different=num_different,
    auc=float(metrics.auc(far, tar)),
    eer=verification.equal_error_rate(far, tar),
    tar_at_far=tuple(points),
  )


def _num_allowed(limit: float, count: int) -> int:
  """Returns the largest k of which k / count is at most the limit."""
  allowed = int(limit * count) + 1
  while allowed / count > limit:
    allowed -= 1
  return allowed


def _resampled_tars(
  scores: np.ndarray,
  falling_same: np.ndarray,
  falling: np.ndarray,
  subjects: np.ndarray,
  limits: Sequence[float],
  *,
  resamples: int,
) -> np.ndarray:
  """Returns the TAR at each limit of resamples of the subjects.

  The weights are those of `verification.bootstrap_weights`. Of the millions of pairs of
  two people only the highest are visited; the weight of all is a product of matrices.

  Args:
    scores: float64[pairs].
    falling_same: int[same], the pairs of one person, highest score first.
    falling: int[different], the others, highest score first.
    subjects: int[pairs, 2], from 0.
    limits: Of the false accept rate.
    resamples: Number of resamples.

  Returns:
    float64[resamples with both kinds of pairs, limits].
  """
  from scipy import sparse

  num_subjects = int(subjects.max()) + 1
  of_same = subjects[falling_same, 0]

  def visit(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the subjects of the highest pairs, and the same pairs above each."""
    some = falling[:count]
    above = np.searchsorted(-scores[falling_same], -scores[some])
    first, second = subjects[some].T.astype(np.intp)
    return first, second, np.append(above, len(falling_same))

  # enough for the largest limit in nearly all resamples; else all are visited
  num_visited = min(len(falling), int(2.5 * max(limits) * len(falling)) + 1000)
  highest = visit(num_visited)
  num_pairs = sparse.coo_matrix(
    (np.ones(len(falling)), tuple(subjects[falling].T)), shape=(num_subjects,) * 2
  ).tocsr()
  rng = np.random.default_rng(0)
  result = []
  for _ in range(resamples):
    drawn = rng.integers(num_subjects, size=num_subjects)
    counts = np.bincount(drawn, minlength=num_subjects)
    true = np.append(0, np.cumsum(counts[of_same]))
    total = int(counts @ (num_pairs @ counts))
    if not true[-1] or not total:
      continue
    allowed = [_num_allowed(limit, total) for limit in limits]
    first, second, above = highest
    false = np.cumsum(counts[first] * counts[second])
    if num_visited < len(falling) and false[-1] <= max(allowed):
      first, second, above = visit(len(falling))
      false = np.cumsum(counts[first] * counts[second])
    first_refused = np.searchsorted(false, allowed, side="right")
    result.append(true[above[first_refused]] / true[-1])
  return np.array(result).reshape(-1, len(limits))


def identify(
  pooled: np.ndarray, probes: Gallery, galleries: Sequence[Gallery]
) -> TemplateIdentification:
  """Returns the figures of the 1:N protocol.

  Args:
    pooled: float64[templates, embedding] of length 1.
    probes: Templates that are searched.
    galleries: Templates that they are searched in.

  Raises:
    errors.DataError: No probe's subject is in a gallery.
  """
  places = np.concatenate([each.places for each in galleries])
  subjects = np.concatenate([each.subjects for each in galleries])
  queries = pooled[probes.places]
  together = identification.identify(queries, probes.subjects, pooled[places], subjects)
  open_sets = []
  for each in galleries:
    found = identification.identify(
      queries, probes.subjects, pooled[each.places], each.subjects
    )
    points = [at for at in found.tpir_at_fpir if at.fpir in FPIR_LIMITS]
    open_sets.append(
      OpenSet(each.name, found.num_probes, found.num_unmated, tuple(points))
    )
  shared = min((each.tpir_at_fpir for each in open_sets), key=len)
  means = [
    identification.TpirAtFpir(
      at.fpir, float(np.mean([each.tpir_at_fpir[n].tpir for each in open_sets]))
    )
    for n, at in enumerate(shared)
  ]
  rank_1, rank_5, rank_10 = (together.cmc[min(n, len(together.cmc)) - 1] for n in RANKS)
  return TemplateIdentification(
    num_probes=together.num_probes,
    num_subjects=together.num_identities,
    rank_1=rank_1,
    rank_5=rank_5,
    rank_10=rank_10,
    open_sets=tuple(open_sets),
    tpir_at_fpir=tuple(means),
    pairwise_tpir_at_fpir=_pairwise_open_set(
      queries, probes.subjects, pooled[places], subjects
    ),
  )


def search_images(
  probes: np.ndarray,
  probe_identities: np.ndarray,
  gallery: np.ndarray,
  gallery_identities: np.ndarray,
) -> ImageSearch:
  """Searches each probe among the images of a gallery, as TinyFace does.

  The rank of a probe is 1 + the images of others whose cosine is at least that of its
  identity's best image: a tie counts against the probe. Ranks count images and not
  identities, so a stranger's three images above the mate make it fourth.

  Args:
    probes: float32[probes, embedding] of length 1.
    probe_identities: int[probes].
    gallery: float32[images, embedding] of length 1.
    gallery_identities: int[images]; -1 for a distractor.

  Raises:
    errors.DataError: A probe's identity is not in the gallery.
  """
  absent = np.flatnonzero(~np.isin(probe_identities, gallery_identities))
  if len(absent):
    raise errors.DataError(
      f"{len(absent)} of {len(probes)} probes have no image of their identity in the "
      f"gallery, such as identity {probe_identities[absent[0]]}; check the lists."
    )
  ranks = []
  for scores, is_mate in _scores(probes, probe_identities, gallery, gallery_identities):
    best = np.max(scores, axis=1, where=is_mate, initial=-np.inf)
    above = (scores >= best[:, np.newaxis]) & ~is_mate
    ranks.append(1 + above.sum(axis=1))
  rank = np.concatenate(ranks)
  cmc = [float(np.mean(rank <= n)) for n in range(1, identification.MAX_RANK + 1)]
  return ImageSearch(len(probes), len(gallery), cmc[0], cmc[4], tuple(cmc))


def _pairwise_open_set(
  probes: np.ndarray,
  probe_subjects: np.ndarray,
  gallery: np.ndarray,
  gallery_subjects: np.ndarray,
) -> tuple[identification.TpirAtFpir, ...]:
  """Returns `TemplateIdentification.pairwise_tpir_at_fpir`."""
  counts = [math.ceil(len(probes) * fpir) for fpir in FPIR_LIMITS]
  highest = np.empty(0)
  mates = []
  for scores, is_mate in _scores(probes, probe_subjects, gallery, gallery_subjects):
    mates.append(np.max(scores, axis=1, where=is_mate, initial=-np.inf))
    highest = np.concatenate([highest, scores[~is_mate]])
    if len(highest) > max(counts):
      highest = np.partition(highest, -max(counts))[-max(counts) :]
  falling = np.sort(highest)[::-1]
  mate = np.concatenate(mates)
  return tuple(
    identification.TpirAtFpir(fpir, float(np.mean(mate > falling[count - 1])))
    for fpir, count in zip(FPIR_LIMITS, counts, strict=True)
    if count <= len(falling)
  )


def _scores(
  probes: np.ndarray,
  probe_labels: np.ndarray,
  gallery: np.ndarray,
  gallery_labels: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the cosines of some probes with the whole gallery, and which are mates."""
  at_once = max(1, _SCORES_AT_ONCE // len(gallery))
  for start in range(0, len(probes), at_once):
    some = slice(start, start + at_once)
    is_mate = probe_labels[some, np.newaxis] == gallery_labels
    yield probes[some] @ gallery.T, is_mate


def _fields(path: str, content: str, *, count: int) -> Iterator[tuple[int, list[str]]]:
  """Yields number and fields of each line that is not blank.

  Raises:
    errors.DataError: A line has another number of fields, or there is no line.
  """
  is_empty = True
  for number, line in enumerate(storage.open_lines(path), 1):
    fields = line.removeprefix("\ufeff").split()
    if fields and len(fields) != count:
      raise errors.DataError(
        f"{path}, line {number}, has {len(fields)} fields instead of {count}; write "
        f"{content}."
      )
    if fields:
      is_empty = False
      yield number, fields
  if is_empty:
    raise errors.DataError(f"{path} is empty; write {content} on each line.")


def _integer(text: str, path: str, number: int) -> int:
  """Returns a field as a number, or raises DataError."""
  if not _INTEGER.fullmatch(text):
    raise errors.DataError(
      f"{path}, line {number}, has {text} where a whole number must be; correct it."
    )
  return int(text)


def _read_points(path: str) -> dict[str, list[float]]:
  """Returns the ten coordinates and the face score of each image."""
  points: dict[str, list[float]] = {}
  content = "image, five points x y, and the face score"
  for number, (name, *texts) in _fields(path, content, count=12):
    try:
      values = list(map(float, texts))
    except ValueError:
      values = [math.nan]
    if not all(map(math.isfinite, values)):
      raise errors.DataError(
        f"{path}, line {number}, has a field that is no finite number; write {content}."
      )
    if name in points:
      raise errors.DataError(
        f"{path}, line {number}, names {name} a second time; keep one line of it."
      )
    points[name] = values
  return points


def _read_pairs(
  path: str, templates: np.ndarray, images_path: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns int32[pairs] twice, places in `templates`, and bool[pairs], their label."""
  with storage.local_copy(path) as local_path, storage.readable(local_path):
    if not os.path.getsize(local_path):
      raise errors.DataError(f"{path} is empty; write two templates and 1 or 0 a line.")
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = np.loadtxt(local_path, np.int32, comments=None, ndmin=2)
      is_table = table.shape[1] == 3
    except (ValueError, OverflowError, Warning):
      is_table = False
  if not is_table:  # read again, slowly, to name the line
    for number, fields in _fields(path, "two templates and 1 or 0", count=3):
      for each in fields:
        if abs(_integer(each, path, number)) >= 1 << 31:
          raise errors.DataError(
            f"{path}, line {number}, has {each}, which is no template; correct it."
          )
    table = np.array(
      [list(map(int, fields)) for _, fields in _fields(path, "", count=3)], np.int32
    )

  def refuse(is_bad: np.ndarray, reason: Callable[[int], str]) -> None:
    """Raises DataError that names the first bad line."""
    if is_bad.any():
      row = int(is_bad.argmax())
      lines = (number for number, _ in _fields(path, "", count=3))
      number = next(number for place, number in enumerate(lines) if place == row)
      raise errors.DataError(f"{path}, line {number}, {reason(row)}")

  labels = table[:, 2]
  refuse(
    (labels != 0) & (labels != 1),
    lambda row: f"has the label {labels[row]}; write 1 for one person and 0 for two.",
  )
  places = []
  for column in (table[:, 0], table[:, 1]):
    place = np.searchsorted(templates, column).astype(np.int32)
    np.minimum(place, len(templates) - 1, out=place)
    refuse(
      templates[place] != column,
      lambda row, column=column: (  # type: ignore[misc]
        f"names template {column[row]}, which has no image in {images_path}; take both "
        "lists from one release."
      ),
    )
    places.append(place)
  return places[0], places[1], labels == 1


def _read_searches(
  meta: Callable[[str], str], templates: np.ndarray
) -> tuple[tuple[Gallery, ...], Gallery | None]:
  """Returns the galleries and probes of 1:N; none if no file of them is there."""
  galleries = {name: meta(f"1N_gallery_{name}.csv") for name in _GALLERIES}
  galleries = {name: path for name, path in galleries.items() if storage.exists(path)}
  probes = meta("1N_probe_mixed.csv")
  if storage.exists(probes) != bool(galleries):
    there, absent = (
      (probes, meta(f"1N_gallery_{_GALLERIES[0]}.csv"))
      if not galleries
      else (next(iter(galleries.values())), probes)
    )
    raise errors.DataError(
      f"{there} is there, but {absent} is not; 1:N needs galleries and probes: add the "
      "missing file, or remove both."
    )
  subject_of: dict[int, int] = {}

  def read(name: str, path: str) -> Gallery:
    """Reads the columns template and subject; a template may have several lines."""
    found: dict[int, int] = {}
    for number, row in enumerate(csv.reader(storage.open_lines(path)), 1):
      if number == 1 or not row:
        continue  # the titles
      if len(row) < 2:
        raise errors.DataError(
          f"{path}, line {number}, is not template,subject; correct it."
        )
      template, subject = (_integer(each.strip(), path, number) for each in row[:2])
      if subject_of.setdefault(template, subject) != subject:
        raise errors.DataError(
          f"{path}, line {number}, gives template {template} a second subject, "
          f"{subject}; keep one."
        )
      place = int(np.searchsorted(templates, template))
      if place == len(templates) or templates[place] != template:
        raise errors.DataError(
          f"{path}, line {number}, names template {template}, which has no image in "
          f"{meta('face_tid_mid.txt')}; take both lists from one release."
        )
      found[place] = subject
    if not found:
      raise errors.DataError(f"{path} names no template; write template,subject.")
    return Gallery(name, np.array(list(found)), np.array(list(found.values())))

  if not galleries:
    return (), None
  read_galleries = tuple(read(name, path) for name, path in galleries.items())
  return read_galleries, read("probe", probes)


def _read_mat(path: str, kind: str, there: list[str]) -> list[tuple[str, int]]:
  """Returns the images and identities of a list of TinyFace, a MATLAB 5 file.

  Args:
    path: The file; it has `gallery_set` and `gallery_ids`, or the same of the probes.
    kind: gallery or probe.
    there: The images that exist.
  """
  from scipy import io  # half a second that training does without

  try:
    with storage.local_copy(path) as local_path, storage.readable(local_path):
      content = io.loadmat(local_path, squeeze_me=True)
    names = [str(each) for each in np.ravel(content[f"{kind}_set"])]
    identities = np.ravel(content[f"{kind}_ids"]).astype(np.int64).tolist()
    if len(names) != len(identities) or not names or min(identities) < 0:
      raise ValueError(f"{len(names)} images with {len(identities)} identities")
  except (
    LookupError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
    zlib.error,
    io.matlab.MatReadError,
  ) as error:
    raise errors.DataError(
      f"{path} is not TinyFace's list of {kind}_set and {kind}_ids "
      f"({errors.first_line(error)}); take it from the release, or remove both lists."
    ) from error
  known = set(there)
  missing = [name for name in names if name not in known]
  if missing:
    raise errors.DataError(
      f"{path} names {len(missing)} images that are not there, such as {missing[0]}; "
      "aligned copies must keep their names."
    )
  return list(zip(names, identities, strict=True))


def _identity(name: str) -> int:
  """Returns the identity in a file name of TinyFace."""
  before, mark, _ = os.path.basename(name).partition("_")
  if not mark or not before.isdecimal():
    raise errors.DataError(
      f"{name} has no identity before an _, as 12_3.jpg has; rename it, or add "
      "gallery_match_img_ID_pairs.mat and probe_img_ID_pairs.mat."
    )
  return int(before)
