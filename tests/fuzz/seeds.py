"""Valid files of each kind, from which a fuzzer starts."""

import io
import pathlib
import pickle
import struct
import tarfile
from collections.abc import Callable

import numpy as np
import simplejpeg

from facedist.data.shards import manifest, shard_index, tfrecord
from tfrecords_tools.sources import mnist

CORPUS = pathlib.Path(__file__).parent / "corpus"
"""A folder for each reader, of files that a fuzzer or somebody found."""
_EMBEDDINGS = """{
"model": "m",
"weights_crc32c": 1,
"embedding_size": 2,
"image_size": 112,
"mirrored": false,
"embeddings": [
{"identity": "a", "embedding": [1.0, 0.0]},
{"identity": "a", "embedding": [0.5, -2e-1]},
{"identity": "b", "embedding": [3, 4]}
],
"skipped": []
}
"""


def by_reader() -> dict[str, list[bytes]]:
  """Returns valid files of each kind, from which the fuzzer starts."""
  record = tfrecord.serialize(tfrecord.Record(b"\xff\xd8 jpeg", 1, "b", "b/1.jpg"))
  framed = tfrecord.frame(record)
  rows = np.zeros(2, shard_index.INDEX_DTYPE)
  rows["length"], rows["image_offset"], rows["image_length"] = 100, 40, 6
  rows["offset"] = [0, 100]
  jpeg = simplejpeg.encode_jpeg(np.zeros((1, 1, 3), np.uint8), quality=10)
  face = tfrecord.frame(tfrecord.serialize(tfrecord.Record(jpeg, 1, "b", "b/1.jpg")))
  return {
    "index": [shard_index.to_bytes(rows), shard_index.to_bytes(rows[:0])],
    "manifest": [_manifest(), b'{"format": 1}'],
    "selection": [_manifest("../s", {"../s": {"prefix": "", "renamed": {"x": "a"}}})],
    "record": [record, framed],
    "shard": [framed * 3],
    "shard_alone": [framed, face * 2],
    "embeddings": [_EMBEDDINGS.encode()],
    "list": [b"n1/1.jpg\n# all\nn1/2.jpg\n", b"gs://b/c/n1/1.jpg\n/d/n1/1.jpg\n"],
    "table": [
      b'NAME_ID,X,Y,W,H\n"n1/0001_01",57,62,82,111\n',
      b"n1/1,1,2,3,4,5,6,7,8,9,10\n",
      b'Class_ID, Name, Flag\nn1, "A,_B", 1\n',
      b"a,b\nb,c\n",
    ],
    "archive": [
      _archive(form, name)
      for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
      for name in ("n1/1.jpg", "n1/" + "x" * 120 + ".jpg", "../n1/1.jpg")
      if form != tarfile.USTAR_FORMAT or len(name) < 100
    ],
    "bin": [
      pickle.dumps(([b"\xff\xd8" + bytes(3)] * 2 + [b"b", b"c"], same), protocol)
      for same in ([True, False], np.array([True, False]))
      for protocol in (0, 2, 5)
    ],
    "npz": [_npz(np.savez), _npz(np.savez_compressed)],
    "csv_pairs": [b"a/1.jpg,b.jpg,1\n", b"image1,same,image2,fold\nx,false,y,3\n"],
    "rec": [
      b"".join(
        b"\x0a\x23\xd7\xce" + struct.pack("<I", kind << 29 | len(part)) + part
        for kind, part in (
          (0, struct.pack("<IfQQ", 0, 3.0, 1, 0) + b"jpeg"),
          (0, struct.pack("<IfQQff", 2, 0.0, 2, 0, 5.0, 1.0)),
          (1, struct.pack("<IfQQ", 0, 4.0, 3, 0)),
          (2, b""),
          (3, b"png."),
        )
      )
    ],
    "pairs": [b"2\t1\nA\t1\t2\nA\t1\tB\t1\nB\t1\t2\nA\t2\tB\t1\n"],
  }


def _manifest(folder: str | None = None, selected: object = None) -> bytes:
  """Returns the manifest of one shard, or of a selection of one in another folder."""
  shard = manifest.Shard("a.tfrecord", 2, 200, 1, "a.index.npy", 2, folder)
  made = manifest.Manifest(
    kind="classification",
    dataset="vggface2",
    tool_version="0",
    image_size=112,
    quality=95,
    alignment={"template": "arcface"},
    source={"seed": 0},
    identities=("a", "b"),
    identity_names={"a": "A"},
    splits={"train": manifest.Split(2, (shard,))},
    skipped=({"path": "a/1.jpg", "reason": "cut off"},),
    selection={"folders": selected} if folder else None,
  )
  return manifest.to_json(made).encode()


def _npz(save: Callable[..., None]) -> bytes:
  """Returns three digits of 2 x 2 pixels."""
  stream = io.BytesIO()
  images, labels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2), np.array([0, 1, 0])
  parts = (images[:2], labels[:2], images[2:], labels[2:])
  save(stream, **dict(zip(mnist.KEYS, parts, strict=True)))
  return stream.getvalue()


def _archive(form: int, name: str) -> bytes:
  """Returns a tar file of one image."""
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode="w", format=form, bufsize=512) as archive:
    info = tarfile.TarInfo(name)
    info.size = 4
    archive.addfile(info, io.BytesIO(b"jpeg"))
  return stream.getvalue()[: 512 * 8]
