"""Names, tables and pairs of drawn faces, in the formats of VGGFace2 and LFW."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from facedist import errors

NUM_FOLDS = 10
_FIRST_NAMES = (
  "Abra", "Bexo", "Calu", "Dorin", "Elka", "Fenn", "Gilda", "Hovi", "Isko", "Jorva",
  "Kelu", "Lomar", "Miska", "Nevo", "Orla", "Pavi", "Quill", "Rondu", "Saffi", "Tavo",
  "Ulka", "Vesna", "Wim", "Xanti", "Yoru", "Zela",
)  # fmt: skip
_STARTS = ("Bar", "Cor", "Dul", "Fen", "Gar", "Hol", "Kes", "Lor", "Mer", "Nor", "Pel")
_MIDDLES = ("", "a", "e", "o", "ei")
_ENDS = ("lund", "mak", "nov", "quist", "reth", "sen", "vik", "ward", "zano")
_NAME_STRIDE = 7919  # shares no factor with the number of names; neighbours differ


@dataclasses.dataclass(frozen=True)
class Faces:
  """Where the faces of one person's images lie.

  Attributes:
    names: Names of the images below the folder of all, without suffix.
    landmarks: float32[images, 5, 2] of x, y in pixels.
    boxes: int64[images, 4] of x, y, width, height in pixels.
  """

  names: tuple[str, ...]
  landmarks: np.ndarray
  boxes: np.ndarray


@dataclasses.dataclass(frozen=True)
class FacePair:
  """Two images as (person, number from 1); one person's or two people's."""

  first: tuple[int, int]
  second: tuple[int, int]


def person_name(number: int) -> str:
  """Returns an invented name, another for each number, such as Tavo_Merlund."""
  parts = (_FIRST_NAMES, _STARTS, _MIDDLES, _ENDS)
  total = int(np.prod([len(part) for part in parts]))
  again, rest = divmod(number, total)
  rest = rest * _NAME_STRIDE % total
  words = []
  for part in parts:
    rest, place = divmod(rest, len(part))
    words.append(part[place])
  name = words[0] + "_" + "".join(words[1:])
  return f"{name}_{again + 1}" if again else name


def landmark_table(people: Iterable[Faces]) -> str:
  """Returns the text of a loose_landmark_*.csv."""
  header = "NAME_ID," + ",".join(
    f"P{point}{axis}" for point in range(1, 6) for axis in "XY"
  )
  return _table(
    header,
    (
      f'"{name}",' + ",".join(f"{value:.4f}" for value in points.ravel())
      for faces in people
      for name, points in zip(faces.names, faces.landmarks, strict=True)
    ),
  )


def box_table(people: Iterable[Faces]) -> str:
  """Returns the text of a loose_bb_*.csv."""
  return _table(
    "NAME_ID,X,Y,W,H",
    (
      f'"{name}",' + ",".join(map(str, box))
      for faces in people
      for name, box in zip(faces.names, faces.boxes.tolist(), strict=True)
    ),
  )


def image_list(people: Iterable[Faces]) -> str:
  """Returns the text of a train_list.txt."""
  return "".join(f"{name}.jpg\n" for faces in people for name in faces.names)


def identity_table(rows: Iterable[tuple[str, str, int, str]]) -> str:
  """Returns the text of an identity_meta.csv from folder, name, images and gender."""
  return _table(
    "Class_ID, Name, Sample_Num, Flag, Gender",
    (
      f'{folder}, "{name}", {images}, 1, {gender}'
      for folder, name, images, gender in rows
    ),
  )


def choose_pairs(
  rng: np.random.Generator, *, num_people: int, num_images: int, num_pairs: int
) -> list[list[FacePair]]:
  """Chooses `num_pairs` of each kind a fold; no person is in two folds.

  Args:
    rng: Where chance comes from.
    num_people: People of all folds.
    num_images: Images of each.
    num_pairs: Pairs of one person in a fold, and as many of two.

  Raises:
    errors.UsageError: There are not as many different pairs.
  """
  folds = []
  for people in np.array_split(np.arange(num_people), NUM_FOLDS):
    images = list(itertools.combinations(range(1, num_images + 1), 2))
    couples = np.stack(np.triu_indices(len(people), 1), axis=1)
    possible = (len(people) * len(images), len(couples) * num_images**2)
    if num_pairs > min(possible):
      raise errors.UsageError(
        f"--lfw_pairs_per_fold={num_pairs}: {len(people)} people a fold with "
        f"{num_images} images each make {possible[0]} pairs of one person and "
        f"{possible[1]} of two; raise --lfw_identities or --lfw_images_per_identity."
      )
    same, different = (
      np.sort(rng.choice(n, num_pairs, replace=False)) for n in possible
    )
    pairs = []
    for number in same:
      person, place = divmod(int(number), len(images))
      first, second = images[place]
      pairs.append(
        FacePair((int(people[person]), first), (int(people[person]), second))
      )
    for number in different:
      couple, place = divmod(int(number), num_images**2)
      one, other = people[couples[couple]]
      first, second = divmod(place, num_images)
      pairs.append(FacePair((int(one), first + 1), (int(other), second + 1)))
    folds.append(pairs)
  return folds


def pairs_text(folds: Sequence[Sequence[FacePair]], names: Sequence[str]) -> str:
  """Returns the text of a pairs.txt; `names` are the people's, by number."""
  lines = [f"{len(folds)}\t{len(folds[0]) // 2}"]
  for pair in itertools.chain.from_iterable(folds):
    (one, first), (other, second) = pair.first, pair.second
    middle = [str(first)] if one == other else [str(first), names[other]]
    lines.append("\t".join([names[one], *middle, str(second)]))
  return "\n".join(lines) + "\n"


def _table(header: str, rows: Iterable[str]) -> str:
  """Joins the lines of a CSV."""
  return "\n".join(itertools.chain([header], rows)) + "\n"
