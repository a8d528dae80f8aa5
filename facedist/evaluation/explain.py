"""Says why two results of facedist.evaluate can differ, from what their rows record:

  python -m facedist.evaluate --explain A.json B.json

Each file is a metrics.jsonl, some of its lines, or what facedist.evaluate --checkpoint
has printed. Of each set that both files have, the last row of each file is compared; if
they share no set, the last row of each file is. To compare other rows, choose them:

  grep '"step": 1200,' /runs/a/metrics.jsonl > A.json
  python -m facedist.evaluate --workdir=/runs/b --checkpoint=900 \\
    --verification_data=lfw=/data/lfw_112 > B.json

It prints what differs and has an effect on the figures, the most important first; what
does not differ; what is not known, because a row is of an older version; and the
figures beside each other with their intervals. The exit code is 0 whether they differ
or not.
"""

import dataclasses
import functools
import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from facedist import config, errors, storage
from facedist.config import setting
from facedist.evaluation.score_log import Row

_FIELDS = (
  *("set", "step", "num_pairs", "fold_accuracies"),
  *("accuracy_mean", "accuracy_std", "auc", "eer"),
)
_COLUMNS = 88
_INTERVALS_ONLY = "this changes the intervals of TAR and nothing else"
_WANTED = "give a metrics.jsonl, or what facedist.evaluate --checkpoint prints"
_ROUNDING = "sums round otherwise, so pairs close to a threshold may change sides"


@dataclasses.dataclass(frozen=True)
class ExplainConfig:
  """Which two results are compared."""

  first: str = setting(help="A's file; also the first word.", path=True)
  second: str = setting(help="B's file; also the second word.", path=True)


class Explanation(NamedTuple):
  """What two rows say of their difference.

  Attributes:
    differs: Sentences on what differs and can change a figure, most important first.
    same: What does not differ.
    unknown: What at least one row does not record.
  """

  differs: list[str]
  same: list[str]
  unknown: list[str]


class Figure(NamedTuple):
  """One figure of two rows.

  Attributes:
    name: As the table names it.
    a: Its value in A.
    b: Its value in B.
    more: What is said behind each value, such as its interval.
    note: On the difference.
  """

  name: str
  a: float
  b: float
  more: tuple[str, ...] = ("", "")
  note: str = ""

  def cells(self) -> tuple[str, str, str, str, str]:
    """Returns its line of the table."""
    a, b = (
      f"{value:.4f}{more}"
      for value, more in zip((self.a, self.b), self.more, strict=True)
    )
    return self.name, a, b, f"{self.b - self.a:+.4f}", self.note


def main(settings: ExplainConfig) -> None:
  """Prints an explanation for each set that both files have."""
  rows_of_a, rows_of_b = read_scores(settings.first), read_scores(settings.second)
  for a, b in choose(rows_of_a, rows_of_b):
    print(text(a, b, settings.first, settings.second), flush=True)


def read_scores(path: str) -> list[Row]:
  """Returns the scores in a file: one JSON object, or one a line.

  Lines of other content than scores are left out, and so is an unfinished last line.

  Raises:
    errors.DataError: The file is missing, is not JSON, or has no score.
  """
  content = storage.read_bytes(path)
  storage.refuse_kind(content, path)
  rows = []
  lines = content.splitlines()
  for number, line in enumerate(lines, 1):
    try:
      rows.append(json.loads(line))
    except ValueError as error:
      if number == 1:  # one object over many lines, perhaps
        rows = [_whole(content, path)]
        break
      if number < len(lines):
        raise errors.DataError(
          f"{path}, line {number}, is not JSON; {_WANTED}."
        ) from error
  scores = [row for row in rows if isinstance(row, dict) and set(_FIELDS) <= set(row)]
  if not scores:
    raise errors.DataError(f"{path} holds no score of a verification set; {_WANTED}.")
  return scores


def choose(
  rows_of_a: Sequence[Row], rows_of_b: Sequence[Row]
) -> Iterator[tuple[Row, Row]]:
  """Yields the last rows of each set that both have, or else the last row of each."""
  last_of_a, last_of_b = (
    {row["set"]: row for row in rows} for rows in (rows_of_a, rows_of_b)
  )
  shared = [name for name in last_of_a if name in last_of_b]
  if not shared:
    yield rows_of_a[-1], rows_of_b[-1]
  for name in shared:
    yield last_of_a[name], last_of_b[name]


def explain(a: Row, b: Row) -> Explanation:
  """Compares what two rows record of how they were made."""
  sides = _Sides(_facts(a), _facts(b))
  found = Explanation([], [], [])
  for check in _CHECKS:
    check(sides, found)
  return found


def figures(a: Row, b: Row) -> list[Figure]:
  """Returns each figure that both rows have.

  Over the same folds of the same pairs, the note of the accuracy has the standard error
  of its difference: the deviation of the folds' differences (divisor: folds - 1) over
  the root of their number. That of a TAR says whether its 95 % intervals overlap.
  """
  note = ""
  change = None
  if _has_same_pairs(a, b) and len(a["fold_accuracies"]) == len(b["fold_accuracies"]):
    change = np.subtract(b["fold_accuracies"], a["fold_accuracies"])
  if change is not None and change.any():
    error = change.std(ddof=1) / math.sqrt(len(change))
    note = f"standard error of the difference {error:.4f}"
  elif change is not None:
    note = "equal in each fold"
  more = tuple(f" ± {row['accuracy_std']:.4f}" for row in (a, b))
  found = [Figure("accuracy", a["accuracy_mean"], b["accuracy_mean"], more, note)]
  found += [Figure(name.upper(), a[name], b[name]) for name in ("auc", "eer")]
  tars = [{_far(at): at for at in row.get("tar_at_far", ())} for row in (a, b)]
  for far, at in tars[0].items():
    if far in tars[1]:
      found.append(_tar(at, tars[1][far], far))
  groups = [
    {each["group"]: each["accuracy"] for each in row["by_group"]["groups"]}
    if "by_group" in row
    else {}
    for row in (a, b)
  ]
  for name, accuracy in groups[0].items():
    if name in groups[1]:
      found.append(Figure(f"accuracy, {name}", accuracy, groups[1][name]))
  return found


def text(a: Row, b: Row, name_of_a: str, name_of_b: str) -> str:
  """Returns the explanation of two rows, to be read.

  Args:
    a: A row.
    b: Another.
    name_of_a: Where `a` is from.
    name_of_b: Where `b` is from.
  """
  found, compared = explain(a, b), figures(a, b)
  if found.differs:
    told = "They can differ because, the most important first:"
  elif found.unknown:
    told = "Nothing that both record differs."
  elif all(each.a == each.b for each in compared):
    told = "Nothing that a figure depends on differs, and the figures are equal."
  else:
    told = (
      "Nothing that is recorded differs, but the figures do. A GPU that adds in no "
      "fixed order can cause that, and so can a file that was edited."
    )
  lines = [
    f"{side}: {row['set']}, step {row['step']}, of {name}"
    for side, row, name in (("A", a, name_of_a), ("B", b, name_of_b))
  ]
  lines += ["", *_wrapped(told)]
  for number, each in enumerate(found.differs, 1):
    lines += _wrapped(each, f"  {number}. ")
  if found.same:
    lines += ["", "These do not differ:"]
    lines += [line for each in found.same for line in _wrapped(each, "  - ")]
  if found.unknown:
    old = [side for side, row in (("A", a), ("B", b)) if "provenance" not in row]
    why = f" ({' and '.join(old)} of an earlier version, which recorded less)"
    lines += ["", *_wrapped(f"Not known{why if old else ''}:")]
    lines += [line for each in found.unknown for line in _wrapped(each, "  - ")]
  table = [("", "A", "B", "B - A", "")] + [each.cells() for each in compared]
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  lines.append("")
  for cells in table:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    lines.append("  ".join(padded).rstrip())
  return "\n".join([*lines, ""])


def run(words: Sequence[str]) -> None:
  """Runs the command line, whose words without -- are the two files.

  Args:
    words: Without the command, such as --explain A.json B.json.
  """
  words = [word.removeprefix("--explain=") for word in words if word != "--explain"]
  files = [word for word in words if not word.startswith("-")]
  flags = [word for word in words if word.startswith("-")]
  if len(files) != 2 and "--help" not in flags:
    config.say_why(
      errors.UsageError(
        f"--explain needs two files, not {len(files)}; write --explain A.json B.json."
      )
    )
    sys.exit(errors.ExitCode.USAGE)
  named = zip(("first", "second"), files, strict=False)
  sys.argv[1:] = [*(f"--{flag}={file}" for flag, file in named), *flags]
  config.run_command(main, ExplainConfig)


def _whole(content: bytes, path: str) -> Any:
  """Returns the one JSON value of a file."""
  try:
    return json.loads(content)
  except ValueError as error:
    raise errors.DataError(f"{path} is not JSON; {_WANTED}.") from error


Facts = dict[str, Any]


class _Sides(NamedTuple):
  """What A and B record."""

  a: Facts
  b: Facts

  def know(self, name: str) -> bool:
    """Says whether both record a fact."""
    return name in self.a and name in self.b

  def same(self, name: str) -> bool:
    """Says whether both record a fact, and the same."""
    return self.know(name) and self.a[name] == self.b[name]

  def differ(self, name: str) -> bool:
    """Says whether both record a fact, and not the same."""
    return self.know(name) and self.a[name] != self.b[name]

  def both(self, name: str) -> str:
    """Returns `x in A and y in B`."""
    return f"{_said(self.a[name])} in A and {_said(self.b[name])} in B"


def _said(value: Any) -> str:
  """Returns a value for a sentence."""
  return "not known" if value is None else str(value)


def _facts(row: Row) -> Facts:
  """Returns what a row records, with or without provenance, in one flat object."""
  made_by = row.get("provenance")
  facts: Facts = {"weights": "trained"} | row  # older rows had no other weights
  facts["folds"] = len(row["fold_accuracies"])
  return facts | (made_by if isinstance(made_by, dict) else {})


def _has_same_pairs(a: Row, b: Row) -> bool:
  """Says whether two rows are certainly of the same pairs."""
  sides = _Sides(_facts(a), _facts(b))
  known = "pairs_crc32c" if sides.know("pairs_crc32c") else "fingerprint"
  return sides.same(known)


def _check_pairs(sides: _Sides, found: Explanation) -> None:
  """Compares the lists of pairs; for rows without their hashes, the whole sets."""
  a, b = sides
  lists = [
    f"{each['num_pairs']} pairs in {each['folds']} folds of {each['set']}"
    for each in sides
  ]
  if sides.know("pairs_crc32c"):
    if sides.same("pairs_crc32c"):
      name = "" if sides.same("set") else f", called {sides.both('set')}"
      found.same.append(f"the pairs ({a['num_pairs']} in {a['folds']} folds{name})")
    elif lists[0] == lists[1]:
      found.differs.append(
        f"The pairs differ: both are {lists[0]}, but a pair, its kind, its fold or the "
        "order of the images is another."
      )
    else:
      found.differs.append(
        f"The pairs differ: A has {lists[0]}, B has {lists[1]}. So these are the "
        "figures of two tests."
      )
  elif sides.same("fingerprint"):
    found.same.append(f"the pairs and images, by the fingerprint {a['fingerprint']}")
  elif sides.differ("fingerprint"):
    found.differs.append(
      f"The sets differ: A has {lists[0]}, B has {lists[1]}, and their fingerprints "
      f"are {a['fingerprint']} and {b['fingerprint']}. Whether pairs or images or both "
      "differ is not recorded."
    )
  else:
    found.unknown.append("whether the pairs and images are the same")


def _check_images(sides: _Sides, found: Explanation) -> None:
  """Compares the decoded pixels, and looks for the reason where they differ."""
  a, b = sides
  if not sides.know("images_crc32c"):
    if sides.same("fingerprint"):
      found.unknown.append("whether the images were decoded to the same pixels")
    return
  if sides.same("images_crc32c"):
    alignment = f"alignment {a['alignment']}" if a.get("alignment") else ""
    about = [f"{a['images']} images", f"{a.get('image_size')} pixels wide", alignment]
    found.same.append(f"the pixels of all images ({', '.join(filter(None, about))})")
    if sides.differ("alignment"):
      found.same.append(
        f"the alignment, as the pixels prove, though it is {sides.both('alignment')}"
      )
    return
  reasons = []
  if sides.differ("image_size"):
    reasons.append(
      f"they are {a['image_size']} pixels wide in A, {b['image_size']} in B"
    )
  if sides.differ("alignment"):
    reasons.append(f"their alignment is {sides.both('alignment')}")
  if sides.differ("images"):
    reasons.append(f"A has {a['images']} of them, B has {b['images']}")
  decoders = [each.get("versions", {}).get("simplejpeg") for each in sides]
  if not reasons and sides.same("fingerprint"):
    if decoders[0] != decoders[1]:
      reasons.append(
        f"the files are the same, but simplejpeg {decoders[0]} decoded them for A and "
        f"{decoders[1]} for B"
      )
    else:
      reasons.append(
        "the files and the decoder's version are the same, so check the memory and "
        "disks of both machines"
      )
  found.differs.append(
    "The images differ in their pixels: "
    + (
      "; ".join(reasons)
      or "they are as many, as large and aligned alike, so some were replaced, encoded "
      "again or put in another order (one pixel is enough)"
    )
    + "."
  )


def _check_weights(sides: _Sides, found: Explanation) -> None:
  """Compares the weights, and looks for the reason where they differ."""
  a = sides.a
  reasons = [
    f"{what} {sides.both(name)}"
    for name, what in (
      ("model", "the network is"),
      ("training_data", "the fingerprint of the training data is"),
      ("training_alignment", "the training images' alignment is"),
      ("step", "the step is"),
      ("weights", "the kind of weights (trained, or ema: their moving average) is"),
    )
    if sides.differ(name)
  ]
  if sides.same("weights_crc32c"):
    found.same.append(f"the weights ({a['model']}, step {a['step']}, {a['weights']})")
  elif sides.know("weights_crc32c") or reasons:
    found.differs.append(
      "The weights differ: "
      + (
        "; ".join(reasons)
        or f"both are {a['model']} at step {a['step']} with the same training data, so "
        "they are of two runs, or one was trained again"
      )
      + "."
    )
  else:
    found.unknown.append(
      f"whether the weights are the same: both are of step {a['step']}, but a row does "
      "not say of which run"
    )


def _check_mirror(sides: _Sides, found: Explanation) -> None:
  """Compares whether mirror images were embedded too."""
  with_mirror = "each image together with its mirror image"
  ways = [with_mirror if each.get("mirrored") else "the image alone" for each in sides]
  if sides.differ("mirrored"):
    found.differs.append(
      f"A embeds {ways[0]}, B {ways[1]} (--mirror): all cosines differ."
    )
  elif sides.know("mirrored"):
    found.same.append(f"the mirror mode ({ways[0]})")


def _check_versions(sides: _Sides, found: Explanation) -> None:
  """Compares versions, those of facedist apart from those that only round."""
  if not sides.know("versions"):
    found.unknown.append("the versions of facedist and its libraries")
    return
  ours, theirs = sides.a["versions"], sides.b["versions"]
  names = list(ours | theirs)
  changed = [
    f"{name} {_said(ours.get(name))} in A and {_said(theirs.get(name))} in B"
    for name in names
    if ours.get(name) != theirs.get(name)
  ]
  for each in changed:
    if each.startswith("facedist "):
      found.differs.append(
        f"The versions differ: {each}; CHANGELOG.md says whether figures changed."
      )
  others = [each for each in changed if not each.startswith("facedist ")]
  if others:
    found.differs.append(f"The versions differ: {', '.join(others)}; {_ROUNDING}.")
  if not changed:
    said = ", ".join(f"{name} {version}" for name, version in ours.items())
    found.same.append(f"the versions ({said})")


def _check_field(
  sides: _Sides, found: Explanation, *, name: str, what: str, effect: str
) -> None:
  """Compares one fact.

  Args:
    sides: What A and B record.
    found: Gets what is found.
    name: The fact's key.
    what: It as the subject of a sentence.
    effect: What a difference does to the figures.
  """
  if sides.differ(name):
    found.differs.append(
      f"{what[0].upper()}{what[1:]} is {sides.both(name)}: {effect}."
    )
  elif not sides.know(name):
    found.unknown.append(what)
  elif sides.a[name] is not None:
    found.same.append(f"{what} ({sides.a[name]})")


def _check_identities(sides: _Sides, found: Explanation) -> None:
  """Compares what the intervals resample; of other pairs they are others anyway."""
  if sides.same("pairs_crc32c"):
    for name, what in (
      ("resampled", "what the intervals resample"),
      ("identities_crc32c", "the hash of the images' identities"),
    ):
      _check_field(sides, found, name=name, what=what, effect=_INTERVALS_ONLY)


def _field(name: str, what: str, effect: str) -> Callable[[_Sides, Explanation], None]:
  return functools.partial(_check_field, name=name, what=what, effect=effect)


# The most important first: another test, other weights, another way of embedding,
# another program, rounding, and then what changes intervals or groups alone.
_CHECKS = (
  _check_pairs,
  _check_images,
  _check_weights,
  _check_mirror,
  _field(
    "pixel_normalization",
    "the normalization of pixels x",
    "the network sees other values",
  ),
  _field("policy", "the precision (--policy)", _ROUNDING),
  _check_versions,
  _field("device", "the device", _ROUNDING),
  _field("batch_size", "the number of images a call (--batch_size)", _ROUNDING),
  _check_identities,
  _field(
    "groups_crc32c",
    "the hash of the images' groups (--groups)",
    "this changes the results by group and nothing else",
  ),
)


def _far(at: Row) -> str:
  """Returns a FAR such as 1e-3."""
  return f"1e{round(math.log10(at['far']))}"


def _tar(a: Row, b: Row, far: str) -> Figure:
  """Returns a TAR with its intervals."""
  if a["low"] is None or b["low"] is None:
    return Figure(f"TAR at FAR {far}", a["tar"], b["tar"])
  overlap = a["low"] <= b["high"] and b["low"] <= a["high"]
  note = "the intervals overlap" if overlap else "the intervals do not overlap"
  more = tuple(f" [{each['low']:.4f}, {each['high']:.4f}]" for each in (a, b))
  return Figure(f"TAR at FAR {far}", a["tar"], b["tar"], more, note)


def _wrapped(sentence: str, start: str = "") -> list[str]:
  """Returns the lines of a sentence behind a bullet or a number."""
  return textwrap.wrap(
    sentence,
    _COLUMNS,
    initial_indent=start,
    subsequent_indent=" " * len(start),
    break_long_words=False,
    break_on_hyphens=False,
  )
