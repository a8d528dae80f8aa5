"""facedist.data.shards.manifest: round trip, corrupt files, the fingerprint."""

import dataclasses
import json

import pytest

from facedist import errors
from facedist.data.shards import manifest


def shard(
  number: int, records: int, crc32c: int, split: str = "train"
) -> manifest.Shard:
  """Returns the entry of one shard."""
  return manifest.Shard(
    name=f"{split}-{number:05d}-of-00002.tfrecord",
    records=records,
    bytes=1000 * records,
    crc32c=crc32c,
    index_name=f"{split}-{number:05d}-of-00002.index.npy",
    index_crc32c=crc32c + 1,
  )


FACES = manifest.Manifest(
  kind="classification",
  dataset="vggface2",
  tool_version="0.1.0",
  image_size=112,
  quality=95,
  alignment={"method": "landmarks", "landmarks": 9, "boxes": 1},
  source={"seed": 7},
  identities=("n000002", "n000003"),
  identity_names={"n000002": "André, the first"},
  splits={
    "train": manifest.Split(8, (shard(0, 4, 11), shard(1, 4, 22))),
    "val": manifest.Split(2, (shard(0, 2, 33, "val"),)),
  },
  skipped=({"path": "n000002/0007_01.jpg", "reason": "not a JPEG"},),
)
PAIRS = manifest.Pairs(name="pairs.npy", pairs=6000, folds=10, crc32c=33)


SELECTED = dataclasses.replace(shard(0, 4, 11), folder="../a")


def selected(*shards: manifest.Shard) -> manifest.Manifest:
  """Returns a selection of these shards."""
  split = manifest.Split(sum(one.records for one in shards), shards)
  return dataclasses.replace(FACES, splits={"train": split}, selection={"seed": 0})


@pytest.mark.parametrize(
  "original",
  [
    FACES,
    dataclasses.replace(FACES, kind="verification", pairs=PAIRS),
    selected(SELECTED),
  ],
)
def test_a_loaded_manifest_equals_the_saved_one(tmp_path, original):
  manifest.save(original, str(tmp_path))
  assert manifest.load(str(tmp_path)) == original
  assert (tmp_path / "manifest.json").read_text() == manifest.to_json(original)


def test_a_builds_manifest_is_readable_by_older_versions_and_by_people():
  content = json.loads(manifest.to_json(FACES))
  assert list(content)[:3] == ["format", "format_version", "kind"]
  assert content["splits"]["train"]["shards"][1]["records"] == 4
  assert "selection" not in content
  assert "folder" not in content["splits"]["train"]["shards"][0]


def test_a_missing_split_is_a_data_error_that_lists_the_others():
  with pytest.raises(errors.DataError, match="shards has no split 'test', only tra"):
    FACES.split("test", "shards")


def test_a_missing_manifest_says_how_to_make_one(tmp_path):
  with pytest.raises(errors.DataError, match=r"tfrecords_tools\.build"):
    manifest.load(str(tmp_path))


@pytest.mark.parametrize(
  ("key", "value"), [("format_version", 2), ("format", "other-shards")]
)
def test_another_format_is_refused_by_its_name(tmp_path, key, value):
  content = json.loads(manifest.to_json(FACES)) | {key: value}
  (tmp_path / "manifest.json").write_text(json.dumps(content))
  with pytest.raises(errors.DataError, match=f"has format .*{value}.* rebuild"):
    manifest.load(str(tmp_path))


def corrupt() -> list[bytes]:
  """Returns files that are no manifest, each wrong in its own way."""
  good = json.loads(manifest.to_json(FACES))
  texts = ["", "{", "[]", "3", "null", "{}", '"text"']
  for name in good:
    texts.append(json.dumps({key: good[key] for key in good if key != name}))
  for change in (
    {"unknown": 1},
    {"splits": {"train": {"records": 8}}},
    {"splits": {"train": {"records": 8, "shards": [{}]}}},
    {"splits": []},
    {"pairs": {"name": "pairs.npy"}},
    {"identities": None},
  ):
    texts.append(json.dumps(good | change))
  return [*(text.encode() for text in texts), b"\xff\xfe\x00"]


@pytest.mark.parametrize("content", corrupt())
def test_a_corrupt_manifest_is_a_data_error_that_names_it(tmp_path, content):
  (tmp_path / "manifest.json").write_bytes(content)
  with pytest.raises(errors.DataError, match=r"manifest\.json is not a manifest"):
    manifest.load(str(tmp_path))


def changed(place: str, value: object) -> str:
  """Returns FACES' JSON with another value at a place such as splits.train.shards.0."""
  content = json.loads(manifest.to_json(FACES))
  *parents, last = place.split(".")
  parent = content
  for name in parents:
    parent = parent[int(name)] if isinstance(parent, list) else parent[name]
  parent[int(last) if isinstance(parent, list) else last] = value
  return json.dumps(content)


SHARD = "splits.train.shards.1"


@pytest.mark.parametrize(
  ("place", "value", "reason"),
  [
    ("kind", "detection", "kind is 'detection'; it must be one of classification, ver"),
    ("kind", "verification", "must have pairs if its kind is verification"),
    ("dataset", 3, "dataset is 3; it must be text"),
    ("dataset", "\ud800", "dataset is .*; it must be text"),
    ("image_size", 0, "image_size is 0; it must be a whole number from 1 to 65500"),
    ("image_size", 112.0, "image_size is 112.0; it must be a whole number"),
    ("image_size", float("nan"), "NaN is no JSON number"),
    ("quality", 101, "quality is 101; it must be a whole number from 0 to 100"),
    ("quality", float("inf"), "Infinity is no JSON number"),
    ("alignment", [], r"alignment is \[\]; it must be an object of at most 16 levels"),
    ("identities", {}, "identities is {}; it must be a list of folders' names"),
    ("identities", ["a", 1], "identities is a list of 2; it must be a list of fold"),
    ("identities", ["a", "b", "a"], "identities: 'a' comes twice"),
    ("identity_names", {"a": None}, "identity_names is an object of 1; it must be"),
    ("splits.train", 3, "splits is an object of 2; it must be an object of splits"),
    ("splits.train.records", 9, "splits.train.records is 9, its shards have 8"),
    ("splits.train.records", True, "splits.train.records is True; it must be"),
    ("splits.train.shards", None, "splits.train.shards is None; it must be a list"),
    (f"{SHARD}.records", -4, r"shards\[1\].records is -4; it must be a whole number"),
    (f"{SHARD}.records", 2**63, "must be a whole number from 0 to 9223372036854775807"),
    (f"{SHARD}.bytes", "8", r"shards\[1\].bytes is '8'; it must be a whole number"),
    (f"{SHARD}.crc32c", 2**32, r"shards\[1\].crc32c is 4294967296; it must be"),
    (f"{SHARD}.name", "../a.tfrecord", "must be the name of a file in the folder"),
    (f"{SHARD}.name", "/etc/passwd", "must be the name of a file in the folder"),
    (f"{SHARD}.name", "a\0b", "must be the name of a file in the folder"),
    (f"{SHARD}.name", "..", "must be the name of a file in the folder"),
    (f"{SHARD}.name", "a" * 256, "must be the name of a file in the folder"),
    (f"{SHARD}.index_name", "a\nb", "must be the name of a file in the folder"),
    (f"{SHARD}.name", "train-00000-of-00002.tfrecord", "shards' name: .* comes twice"),
    (f"{SHARD}.folder", "", r"shards\[1\].folder is ''; it must be a folder's path"),
    (f"{SHARD}.folder", "a\0b", "it must be a folder's path, or gs://"),
    ("selection", 3, "selection is 3; it must be an object of at most 16 levels"),
    (f"{SHARD}.more", 1, r"splits.train.shards\[1\].more is not known"),
    ("pairs", 3, "pairs is 3; it must be an object"),
    ("pairs", {"name": "../pairs.npy"}, "pairs.name is '../pairs.npy'; it must be the"),
    ("skipped.0", {"path": "a"}, r"it lacks skipped\[0\].reason"),
  ],
)
def test_an_invalid_value_is_named_with_its_rule(tmp_path, place, value, reason):
  (tmp_path / "manifest.json").write_text(changed(place, value))
  with pytest.raises(errors.DataError, match=rf"is not a manifest \(.*{reason}"):
    manifest.load(str(tmp_path))


def test_brackets_nested_to_exhaust_the_stack_are_a_data_error(tmp_path):
  for text in ("[" * 100_000, '{"format":' * 100_000):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(errors.DataError, match="nested too deeply"):
      manifest.load(str(tmp_path))
  nested: dict[str, object] = {}
  for _ in range(16):
    nested = {"a": nested}
  (tmp_path / "manifest.json").write_text(changed("source", nested))
  with pytest.raises(errors.DataError, match="source is an object of 1; it must be"):
    manifest.load(str(tmp_path))
  (tmp_path / "manifest.json").write_text(changed("source", nested["a"]))
  assert manifest.load(str(tmp_path)).source == nested["a"]


def test_a_format_nested_deeply_is_shown_in_one_short_line(tmp_path):
  text = json.dumps(json.loads(manifest.to_json(FACES)) | {"format": 1})
  deep = "[" * 900 + "]" * 900
  (tmp_path / "manifest.json").write_text(
    text.replace('"format": 1', f'"format":{deep}')
  )
  with pytest.raises(errors.DataError, match="has format a list of 1, 1, not"):
    manifest.load(str(tmp_path))


def test_a_key_that_occurs_twice_is_refused(tmp_path):
  text = manifest.to_json(FACES).replace('"quality"', '"quality": 1, "quality"')
  (tmp_path / "manifest.json").write_text(text)
  with pytest.raises(errors.DataError, match="keys: 'quality' comes twice"):
    manifest.load(str(tmp_path))


def test_the_fingerprint_changes_with_content_labels_and_pairs_only():
  same = dataclasses.replace(FACES, tool_version="9.9", source={}, skipped=())
  assert same.fingerprint == FACES.fingerprint
  assert len(FACES.fingerprint) == 8
  train = manifest.Split(8, (shard(0, 4, 11), shard(1, 4, 23)))
  changed = [
    dataclasses.replace(FACES, splits=FACES.splits | {"train": train}),
    dataclasses.replace(FACES, identities=("n000003", "n000002")),
    dataclasses.replace(FACES, pairs=PAIRS),
  ]
  prints = {one.fingerprint for one in [FACES, *changed]}
  assert len(prints) == 4


@pytest.mark.parametrize(
  ("folder", "other", "path"),
  [
    ("/data/sel", None, "/data/sel/train-00000-of-00002.tfrecord"),
    ("/data/sel", "../a", "/data/sel/../a/train-00000-of-00002.tfrecord"),
    ("/data/sel", "/b", "/b/train-00000-of-00002.tfrecord"),
    ("/data/sel", "gs://b/a", "gs://b/a/train-00000-of-00002.tfrecord"),
    ("gs://b/x/sel", "../../a", "gs://b/a/train-00000-of-00002.tfrecord"),
    ("gs://b/x/sel", "gs://c", "gs://c/train-00000-of-00002.tfrecord"),
  ],
)
def test_a_selections_shard_is_found_where_it_was_built(folder, other, path):
  one = dataclasses.replace(shard(0, 4, 11), folder=other)
  assert one.path(folder) == path
  assert one.index_path(folder) == f"{folder}/train-00000-of-00002.index.npy"


def test_the_fingerprint_of_a_selection_changes_with_its_rows_but_not_with_places():
  other_rows = dataclasses.replace(SELECTED, index_crc32c=99)
  moved = dataclasses.replace(SELECTED, folder="gs://b/a")
  assert selected(SELECTED).fingerprint != selected(other_rows).fingerprint
  assert selected(SELECTED).fingerprint == selected(moved).fingerprint


def test_copies_of_shards_of_one_name_have_names_of_their_own():
  a, b = (
    dataclasses.replace(shard(0, 4, crc32c), folder=f"../{crc32c}")
    for crc32c in (0xA, 0xB)
  )
  copy = manifest.gathered(selected(a, b))
  assert [one.name for one in copy.shards] == [
    "0000000a-train-00000-of-00002.tfrecord",
    "0000000b-train-00000-of-00002.tfrecord",
  ]
  assert {one.folder for one in copy.shards} == {None}
  assert copy.fingerprint == selected(a, b).fingerprint
  assert manifest.gathered(FACES) == FACES


@pytest.mark.parametrize(
  ("images", "expected"),
  [
    ({}, None),
    ({"landmarks": 10}, "arcface"),
    ({"landmarks": 95, "centre_crop": 5}, "arcface"),
    ({"landmarks": 60, "bounding_box": 40}, "mixed"),
    ({"centre_crop": 3}, "centre_crop"),
    ({"bounding_box": 3}, "bounding_box"),
    ({"source_bytes_kept": 3}, "as_given"),
  ],
)
def test_the_alignment_is_what_was_done_to_nearly_all_images(images, expected):
  assert manifest.main_alignment(images) == expected


def test_an_older_manifest_tells_its_alignment_by_its_counts():
  made = dataclasses.replace(
    FACES, alignment={"template": "arcface", "images": {"centre_crop": 4}}
  )
  assert made.aligned_by == "centre_crop"
  assert dataclasses.replace(made, alignment={"template": "x"}).aligned_by == "x"
  assert dataclasses.replace(made, alignment={"method": "drawn"}).aligned_by is None


@pytest.mark.parametrize(
  ("first", "second", "expected"),
  [
    ("arcface", "arcface", False),
    ("arcface", "centre_crop", True),
    ("arcface", "mixed", True),
    ("arcface", "as_given", False),
    (None, "centre_crop", False),
  ],
)
def test_only_known_alignments_can_differ(first, second, expected):
  assert manifest.alignments_differ(first, second) is expected
  assert manifest.alignments_differ(second, first) is expected
