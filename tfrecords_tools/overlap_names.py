"""People of the training set who are also in LFW, found by name.

A model that was trained on them scores too well there; leave them out.
"""

import unicodedata
from collections.abc import Collection, Mapping

from tfrecords_tools import tables


def read_people(path: str) -> set[str]:
  """Returns the names in LFW's pairs.txt, people.txt or a list of names."""
  words = (word for line in tables.read_lines(path) for word in line.split())
  return {word for word in words if not word.isdecimal()}


def overlapping(
  identity_names: Mapping[str, str], people: Collection[str]
) -> tuple[str, ...]:
  """Returns the identities, sorted, whose name is also in `people`."""
  normalised = {normalise(name) for name in people}
  return tuple(
    sorted(
      identity
      for identity, name in identity_names.items()
      if normalise(name) in normalised
    )
  )


def normalise(name: str) -> str:
  """Drops what spellings differ in: case, accents, dots, spaces and underscores."""
  decomposed = unicodedata.normalize("NFKD", name).casefold()
  return "".join(letter for letter in decomposed if letter.isalnum())
