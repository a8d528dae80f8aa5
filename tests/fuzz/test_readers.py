"""The readers of files on hostile inputs: those that were found, and random ones.

`make fuzz` looks for more, led by coverage; what it finds goes into tests/fuzz/corpus,
or into FOUND if it is longer than a page.
"""

import codecs
import pickle
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import readers, seeds


class LongText:
  """Ten thousand letters that a pickle holds once, and names for each object."""

  TEXT = "x" * 10_000

  def __reduce__(self) -> tuple:
    return codecs.encode, (self.TEXT, "latin1")


FOUND = [
  ("manifest", b"[" * 100_000),
  ("manifest", b'{"a":' * 100_000),
  ("manifest", b'{"format": "facedist-shards", "format_version": 1%s}' % (b"0" * 5000)),
  ("record", b"\n" + b"\x80" * 10_000),
  ("record", b"\x0b" * 10_000),
  ("shard", bytes(10_000)),
  ("table", b'"' + b"x" * 200_000),
  ("table", b"x" * (1 << 20) + b"xn1/1,1,2,3,4\n"),
  ("list", b"n1/" + b"x" * (1 << 20) + b".jpg\n"),
  ("bin", pickle.dumps(([LongText() for _ in range(200)], [True] * 100), 4)),
  ("pairs", b"9" * 5000 + b" 1\n"),
  ("pairs", b"1 1\nA 1 2\nA 1 B " + b"9" * 5000),
]


def inputs() -> Iterator[tuple[str, str, bytes]]:
  """Yields reader, name and content of valid files, of none, and of those found."""
  for reader, valid in seeds.by_reader().items():
    for number, content in enumerate([b"", *valid]):
      yield reader, f"valid-{number}", content
    for path in sorted((seeds.CORPUS / reader).iterdir()):
      yield reader, path.name, path.read_bytes()
  for number, (reader, content) in enumerate(FOUND):
    yield reader, f"found-{number}", content


@pytest.mark.parametrize(
  ("reader", "content"),
  [pytest.param(one, text, id=f"{one}-{name}") for one, name, text in inputs()],
)
def test_valid_files_and_those_once_found_are_read_or_refused(reader, content):
  readers.READERS[reader](content)


@pytest.mark.parametrize("reader", sorted(readers.READERS))
@given(data=st.data())
def test_no_bytes_end_a_reader_but_in_a_data_error(reader: str, data):
  valid = data.draw(st.sampled_from(seeds.by_reader()[reader]))
  start = data.draw(st.integers(0, len(valid)))
  end = data.draw(st.integers(start, len(valid)))
  changed = valid[:start] + data.draw(st.binary(max_size=40)) + valid[end:]
  readers.READERS[reader](changed)
