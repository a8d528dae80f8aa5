"""What a manifest's JSON must be: types, ranges and sums, before anything trusts it.

Each rule is a test of a value and what to say of one that fails it. Whoever adds a
field to a manifest's dataclasses adds its rule here.
"""

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

Rule = tuple[Callable[[Any], bool], str]

KINDS = ("classification", "verification")
MAX_DEPTH = 16  # of nested settings; a hundred times that ends Python's stack
_MAX_COUNT = 2**63 - 1
_MAX_NAME_BYTES = 255  # of a file, on every file system in use


def parse(text: bytes) -> dict[str, Any]:
  """Returns the object that a JSON text holds.

  Raises:
    ValueError: It is no JSON object, holds NaN or infinity, nests too deeply, or
      has a key twice.
  """
  try:
    content = json.loads(
      text, parse_constant=_refuse_constant, object_pairs_hook=_without_twins
    )
  except RecursionError as error:
    raise ValueError("it is nested too deeply") from error
  if not isinstance(content, dict):
    raise ValueError("it is no JSON object")
  return content


def check(content: dict[str, Any]) -> None:
  """Checks a manifest without its format and version.

  Raises:
    ValueError: Names the value at fault by its place and says what it must be.
  """
  _check_object(content, _MANIFEST, place="")
  _check_unique(content["identities"], place="identities")
  for name, split in content["splits"].items():
    _check_split(split, place=f"splits.{name}")
  _check_files(content)
  if content["pairs"] is not None:
    _check_object(content["pairs"], _PAIRS, place="pairs.")
  if (content["kind"] == "verification") != (content["pairs"] is not None):
    raise ValueError("it must have pairs if its kind is verification, and else none")
  for number, entry in enumerate(content["skipped"]):
    _check_object(entry, _SKIPPED, place=f"skipped[{number}].")


def _check_split(split: Any, *, place: str) -> None:
  """Checks a split, its shards, and that their records add up."""
  _check_object(split, _SPLIT, place=f"{place}.")
  for number, shard in enumerate(split["shards"]):
    _check_object(shard, _SHARD, place=f"{place}.shards[{number}].")
  counted = sum(shard["records"] for shard in split["shards"])
  if split["records"] != counted:
    raise ValueError(
      f"{place}.records is {split['records']}, its shards have {counted}"
    )


def _check_files(content: dict[str, Any]) -> None:
  """Checks that no file has two roles; a selection may use parts of a shard twice."""
  shards = [shard for split in content["splits"].values() for shard in split["shards"]]
  _check_unique((shard["index_name"] for shard in shards), place="shards' index_name")
  if content.get("selection") is None:
    _check_unique((shard["name"] for shard in shards), place="shards' name")


def _check_object(value: Any, rules: dict[str, Rule], *, place: str) -> None:
  """Checks an object's keys and the value of each; `place` ends with a dot."""
  if not isinstance(value, dict):
    raise ValueError(f"{place.rstrip('.')} is {shown(value)}; it must be an object")
  for name, (is_right, text) in rules.items():
    if name not in value:
      if name in _OPTIONAL:
        continue
      raise ValueError(f"it lacks {place}{name}")
    if not is_right(value[name]):
      raise ValueError(f"{place}{name} is {shown(value[name])}; it must be {text}")
  for name in value.keys() - rules.keys():
    raise ValueError(f"{place}{name[:80]} is not known")


def _check_unique(names: Iterable[str], *, place: str) -> None:
  """Raises ValueError if a name comes twice."""
  seen: set[str] = set()
  for name in names:
    if name in seen:
      raise ValueError(f"{place}: {name!r} comes twice")
    seen.add(name)


def _is_text(value: Any) -> bool:
  """Says whether it is text that can be written; JSON can hold half a character."""
  if not isinstance(value, str):
    return False
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


def _is_file_name(value: Any) -> bool:
  """Says whether it names a file of the folder itself: no path, nothing unprintable."""
  return (
    _is_text(value)
    and value not in ("", ".", "..")
    and "/" not in value
    and value.isprintable()
    and len(value.encode()) <= _MAX_NAME_BYTES
  )


def _is_folder(value: Any) -> bool:
  """Says whether it can be where a shard lies: a path, relative or not, or gs://."""
  return value is None or (_is_text(value) and value != "" and value.isprintable())


def _is_free_object(value: Any) -> bool:
  """Says whether it is an object that nests no deeper than MAX_DEPTH."""
  level: list[Any] = [value]
  for _ in range(MAX_DEPTH if isinstance(value, dict) else 0):
    values = itertools.chain.from_iterable(
      one.values() if isinstance(one, dict) else one for one in level
    )
    level = [one for one in values if isinstance(one, dict | list)]
  return isinstance(value, dict) and not level


def _between(low: int, high: int) -> Rule:
  """Returns the rule of a whole number; True is none, though Python says so."""
  return (
    lambda value: type(value) is int and low <= value <= high,
    f"a whole number from {low} to {high}",
  )


def _list_of(is_right: Callable[[Any], bool], text: str) -> Rule:
  """Returns the rule of a list."""
  return lambda value: isinstance(value, list) and all(map(is_right, value)), text


def _object_of(is_right: Callable[[Any], bool], text: str) -> Rule:
  """Returns the rule of an object whose values are alike."""
  return (
    lambda value: (
      isinstance(value, dict)
      and all(map(_is_text, value))
      and all(map(is_right, value.values()))
    ),
    text,
  )


def shown(value: Any) -> str:
  """Returns a value as an error shows it, in one short line."""
  if isinstance(value, dict | list) and len(value) > 0:
    return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
  return ascii(value)[:80]


def _refuse_constant(name: str) -> None:
  """Raises ValueError for NaN and infinities, which JSON does not have."""
  raise ValueError(f"{name} is no JSON number")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns an object; ValueError where a key comes twice, as readers differ then."""
  content = dict(pairs)
  if len(content) < len(pairs):
    _check_unique((name for name, _ in pairs), place="an object's keys")
  return content


_TEXT: Rule = (_is_text, "text")
_FILE_NAME: Rule = (_is_file_name, "the name of a file in the folder")
_COUNT = _between(0, _MAX_COUNT)
_CRC32C = _between(0, 2**32 - 1)
_FREE: Rule = (_is_free_object, f"an object of at most {MAX_DEPTH} levels")
_ANY: Rule = (lambda value: True, "")
_OPTIONAL = ("folder", "selection")  # which builds do not write

_MANIFEST: dict[str, Rule] = {
  "kind": (lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
  "dataset": _TEXT,
  "tool_version": _TEXT,
  "image_size": _between(1, 65_500),  # pixels; a JPEG has no more
  "quality": _between(0, 100),  # 0: not known, of shards whose manifest was lost
  "alignment": _FREE,
  "source": _FREE,
  "identities": _list_of(_is_text, "a list of folders' names"),
  "identity_names": _object_of(_is_text, "an object of names by folder"),
  "splits": _object_of(lambda value: isinstance(value, dict), "an object of splits"),
  "pairs": _ANY,
  "skipped": _list_of(lambda value: isinstance(value, dict), "a list of objects"),
  "selection": (
    lambda value: value is None or _is_free_object(value),
    f"an object of at most {MAX_DEPTH} levels",
  ),
}
_SPLIT: dict[str, Rule] = {
  "records": _COUNT,
  "shards": _list_of(lambda value: isinstance(value, dict), "a list of shards"),
}
_SHARD: dict[str, Rule] = {
  "name": _FILE_NAME,
  "records": _COUNT,
  "bytes": _COUNT,
  "crc32c": _CRC32C,
  "index_name": _FILE_NAME,
  "index_crc32c": _CRC32C,
  "folder": (_is_folder, "a folder's path, or gs://"),
}
_PAIRS: dict[str, Rule] = {
  "name": _FILE_NAME,
  "pairs": _COUNT,
  "folds": _COUNT,
  "crc32c": _CRC32C,
}
_SKIPPED: dict[str, Rule] = {"path": _TEXT, "reason": _TEXT}
