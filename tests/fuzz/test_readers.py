"""The readers of files on hostile inputs: those that were found, and random ones.

`make fuzz` looks for more, led by coverage.
"""

import codecs
import io
import pickle
import struct
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facedist.data.shards import shard_index, tfrecord
from tests.fuzz import keep, readers, seeds
from tfrecords_tools.sources import mnist


def npy(header: str) -> bytes:
  """Returns a NumPy file of this header and four bytes."""
  return (
    b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + b"1234"
  )


def header_of(shape: str) -> str:
  """Returns an index's header with another shape."""
  descr = shard_index.INDEX_DTYPE.descr
  return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


def length_header(length: int) -> bytes:
  """Returns the header of a record that claims this length, with a valid CRC."""
  packed = struct.pack("<Q", length)
  return packed + struct.pack("<I", tfrecord.masked_crc(packed))


def npz(member: bytes) -> bytes:
  """Returns an .npz file of the digits' keys, each with this content."""
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, "w") as archive:
    for key in mnist.KEYS:
      archive.writestr(f"{key}.npy", member)
  return stream.getvalue()


class LongText:
  """Ten thousand letters that a pickle holds once, and names for each object."""

  TEXT = "x" * 10_000

  def __reduce__(self) -> tuple:
    return codecs.encode, (self.TEXT, "latin1")


FOUND = [
  # Rows and pixels that a header claims, and parsers that a header can exhaust.
  ("index", npy(header_of("(1000000000000000000,)"))),
  ("index", npy(header_of("(-1,)"))),
  ("index", npy(header_of("(1000000000000000000, 0)"))),
  ("index", npy("(" * 900)),
  ("index", npy("-" * 900 + "1")),
  ("index", b"PK\x03\x04" + bytes(60)),
  ("manifest", b"[" * 100_000),
  ("manifest", b'{"a":' * 100_000),
  ("manifest", b'{"format": ' + b"[" * 900 + b"]" * 900 + b', "format_version": 1}'),
  (
    "manifest",
    b'{"format": "facedist-shards", "format_version": 1' + b"0" * 5000 + b"}",
  ),
  ("manifest", b'{"format": NaN, "format_version": Infinity}'),
  ("record", length_header(2**63) + bytes(20)),
  ("record", b"\n" + b"\xff" * 9 + b"\x7f"),
  ("record", b"\n" + b"\x80" * 10_000),
  ("record", b"\x0b" * 10_000),
  ("record", b"\x00" * 6),
  ("shard", length_header(2**63) + bytes(20)),
  ("shard", length_header(2**32) + bytes(20)),
  ("shard", bytes(10_000)),
  ("shard_alone", length_header(2**63) + bytes(20)),
  ("shard_alone", length_header(0) + bytes(4)),
  ("table", b'"' + b"x" * 200_000),
  ("table", b"x" * (1 << 20) + b"xn1/1,1,2,3,4\n"),
  ("list", b"n1/" + b"x" * (1 << 20) + b".jpg\n"),
  ("list", b"n1/\0.jpg\nn\0/1.jpg\n"),
  ("table", b"n1/1,1,2,3,1e999\n"),
  ("table", b"n1/1,1,2,3,nan\n"),
  ("table", b"\xef\xbb\xbf\x00,,,,\n"),
  # Selections that do not say what their records call an identity.
  ("selection", seeds.selection({})),
  ("selection", seeds.selection(3)),
  ("selection", seeds.selection({"../s": {}})),
  ("selection", seeds.selection({"../s": {"renamed": {}}})),
  ("selection", seeds.selection({"../s": {"prefix": 3, "renamed": {}}})),
  ("selection", seeds.selection({"../s": {"prefix": "", "renamed": [["a", 3]]}})),
  # Names that climb, and one image many times.
  ("archive", seeds.by_reader()["archive"][-1]),
  ("archive", b"/" * 512),
  ("bin", pickle.dumps(([LongText() for _ in range(200)], [True] * 100), 4)),
  ("bin", b"\x80\x05\x96" + b"\xff" * 7 + b"\x00."),
  ("npz", npz(npy(header_of("(1000000000000000000,)")))),
  ("npz", npz(npy("(" * 900))),
  ("npz", npz(b"no array")),
  ("pairs", b"9" * 5000 + b" 1\n"),
  ("pairs", b"1 1\nA 1 2\n../../etc/passwd 1 A 2\n"),
  ("pairs", b"1 1\nA 1 2\nA 1 B " + b"9" * 5000),
]


@pytest.mark.parametrize(  # by number: an archive's bytes hold the time it was made at
  ("reader", "content"), FOUND, ids=[f"{one[0]}-{n}" for n, one in enumerate(FOUND)]
)
def test_what_once_was_found_is_refused_or_read(reader: str, content: bytes):
  readers.READERS[reader](content)


@pytest.mark.parametrize("reader", sorted(readers.READERS))
@given(data=st.data())
def test_no_bytes_end_a_reader_but_in_a_data_error(reader: str, data):
  valid = data.draw(st.sampled_from(seeds.by_reader()[reader]))
  start = data.draw(st.integers(0, len(valid)))
  end = data.draw(st.integers(start, len(valid)))
  changed = valid[:start] + data.draw(st.binary(max_size=40)) + valid[end:]
  readers.READERS[reader](changed)


@pytest.mark.parametrize("reader", sorted(readers.READERS))
def test_what_the_fuzzer_reached_code_with_is_refused_or_read(reader: str):
  paths = sorted((keep.CORPUS / reader).iterdir())
  assert paths
  for path in paths:
    readers.READERS[reader](path.read_bytes())


@pytest.mark.parametrize("reader", sorted(readers.READERS))
def test_valid_files_and_none_at_all_are_read(reader: str):
  for content in (*seeds.by_reader()[reader], b""):
    readers.READERS[reader](content)
