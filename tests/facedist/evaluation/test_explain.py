"""Two rows that differ in one fact, and what is said of their difference."""

import copy
import json
import math
import pathlib

import pytest

from facedist import errors
from facedist.evaluation import explain

ROW = json.loads("""{
  "step": 1200, "set": "lfw", "fingerprint": "0123abcd", "mirrored": true,
  "weights": "trained", "num_pairs": 40, "accuracy_mean": 0.75, "accuracy_std": 0.05,
  "fold_accuracies": [0.7, 0.8, 0.7, 0.8], "auc": 0.875, "eer": 0.25,
  "tar_at_far": [{"far": 0.1, "tar": 0.5, "low": 0.4, "high": 0.6}],
  "resampled": "identities", "images": 60,
  "provenance": {
    "set": "lfw", "fingerprint": "0123abcd", "pairs_crc32c": "aaaaaaaa",
    "images_crc32c": "bbbbbbbb", "identities_crc32c": "cccccccc",
    "groups_crc32c": null, "alignment": "arcface", "model": "iresnet50-512",
    "step": 1200, "weights": "trained", "weights_crc32c": "dddddddd",
    "image_size": 112, "normalized": true, "mirrored": true,
    "pixel_normalization": "(x - 127.5) / 127.5", "policy": "float32",
    "training_data": "eeeeeeee", "training_alignment": "arcface", "batch_size": 128,
    "versions": {"facedist": "0.1.0", "tensorflow": "2.15.1", "simplejpeg": "1.7.3"},
    "device": "CPU"
  }
}""")


def _changed(**facts) -> dict:
  """Returns ROW with other facts, wherever it has them."""
  row = copy.deepcopy(ROW)
  row["provenance"]["versions"] |= facts.pop("versions", {})
  for name, value in facts.items():
    assert name in row or name in row["provenance"]
    for part in (row, row["provenance"]):
      if name in part:
        part[name] = value
  return row


def _older(**facts) -> dict:
  row = _changed(**facts)
  del row["provenance"]
  return row


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"pairs_crc32c": "1"}, "The pairs differ: both are 40 pairs in 4 folds of lfw, "),
    (
      {"pairs_crc32c": "1", "num_pairs": 41, "set": "cfp"},
      "A has 40 pairs in 4 folds of lfw, B has 41 pairs in 4 folds of cfp. So these",
    ),
    ({"images_crc32c": "1", "fingerprint": "2"}, "one pixel is enough"),
    ({"images_crc32c": "1"}, "check the memory and disks of both machines."),
    (
      {"images_crc32c": "1", "fingerprint": "2", "image_size": 160},
      "differ in their pixels: they are 112 pixels wide in A, 160 in B.",
    ),
    (
      {"images_crc32c": "1", "fingerprint": "2", "alignment": "centre_crop"},
      "their alignment is arcface in A and centre_crop in B.",
    ),
    ({"images_crc32c": "1", "images": 61}, "A has 60 of them, B has 61."),
    ({"weights_crc32c": "1"}, "both are iresnet50-512 at step 1200 with the same trai"),
    (
      {"weights_crc32c": "1", "step": 2400, "weights": "ema"},
      "differ: the step is 1200 in A and 2400 in B; the kind of weights (trained, or "
      "ema: their moving average) is trained in A and ema in B.",
    ),
    (
      {"weights_crc32c": "1", "training_alignment": None},
      "the training images' alignment is arcface in A and not known in B.",
    ),
    ({"mirrored": False}, "A embeds each image together with its mirror image, B the"),
    (
      {"pixel_normalization": "x / 255"},
      "The normalization of pixels x is (x - 127.5)",
    ),
    ({"policy": "mixed_float16"}, "is float32 in A and mixed_float16 in B: sums round"),
    ({"versions": {"facedist": "0.2.0"}}, "facedist 0.1.0 in A and 0.2.0 in B; CHANGE"),
    ({"versions": {"numpy": "2.0"}}, "numpy not known in A and 2.0 in B; sums round"),
    ({"device": "NVIDIA A100"}, "The device is CPU in A and NVIDIA A100 in B: sums"),
    ({"batch_size": 64}, "The number of images a call (--batch_size) is 128 in A"),
    ({"resampled": "pairs"}, "resample is identities in A and pairs in B: this change"),
    ({"identities_crc32c": None}, "changes the intervals of TAR and nothing else."),
    ({"groups_crc32c": "1"}, "this changes the results by group and nothing else."),
  ],
)
def test_one_change_is_the_one_reason(changes, says):
  found = explain.explain(ROW, _changed(**changes))
  (reason,) = found.differs
  assert says in reason
  assert not found.unknown


def test_a_decoder_that_decodes_otherwise_is_named_with_its_version():
  other = _changed(images_crc32c="1", versions={"simplejpeg": "1.8.2"})
  assert explain.explain(ROW, other).differs[0] == (
    "The images differ in their pixels: the files are the same, but simplejpeg 1.7.3 "
    "decoded them for A and 1.8.2 for B."
  )


def test_the_order_is_by_importance_and_not_by_the_order_in_the_rows():
  checksums = ("weights_crc32c", "images_crc32c", "pairs_crc32c")
  other = _changed(batch_size=1, mirrored=False, **dict.fromkeys(checksums, "1"))
  starts = [" ".join(each.split()[:2]) for each in explain.explain(ROW, other).differs]
  assert starts == ["The pairs", "The images", "The weights", "A embeds", "The number"]


def test_another_name_or_fingerprint_of_the_same_pixels_and_pairs_is_no_reason():
  found = explain.explain(ROW, _changed(set="lfw_112", fingerprint="1", alignment="a"))
  assert not found.differs
  assert "the pairs (40 in 4 folds, called lfw in A and lfw_112 in B)" in found.same
  assert (
    "the alignment, as the pixels prove, though it is arcface in A and a in B"
  ) in found.same


def test_rows_of_earlier_versions_are_compared_by_what_they_have():
  found = explain.explain(_older(), _older(mirrored=False, weights="ema"))
  assert [reason.split()[0] for reason in found.differs] == ["The", "A"]
  assert "(trained, or ema" in found.differs[0]
  assert "the pairs and images, by the fingerprint 0123abcd" in found.same
  assert "whether the images were decoded to the same pixels" in found.unknown
  assert "the versions of facedist and its libraries" in found.unknown


def test_a_rebuilt_set_without_hashes_leaves_open_what_was_changed():
  found = explain.explain(ROW, _older(fingerprint="1"))
  (reason,) = found.differs
  assert "their fingerprints are 0123abcd and 1. Whether pairs or images" in reason
  assert "both are of step 1200, but a row does not say of which run" in " ".join(
    found.unknown
  )


def test_figures_are_compared_with_the_error_of_the_difference_over_the_same_folds():
  other = _changed(
    fold_accuracies=[0.7, 0.9, 0.7, 0.8],
    accuracy_mean=0.775,
    tar_at_far=[
      {"far": 0.1, "tar": 0.8, "low": 0.7, "high": 0.9},
      {"far": 0.01, "tar": 0.1, "low": None, "high": None},
    ],
  )
  accuracy, auc, eer, tar = explain.figures(ROW, other)
  # differences 0, 0.1, 0, 0: mean 0.025, squares 3 · 0.025² + 0.075² = 0.0075
  error = math.sqrt(0.0075 / 3) / math.sqrt(4)
  assert accuracy.cells() == (
    *("accuracy", "0.7500 ± 0.0500", "0.7750 ± 0.0500", "+0.0250"),
    f"standard error of the difference {error:.4f}",
  )
  assert auc.cells() == ("AUC", "0.8750", "0.8750", "+0.0000", "")
  assert eer.name == "EER"
  assert tar.cells() == (
    *("TAR at FAR 1e-1", "0.5000 [0.4000, 0.6000]", "0.8000 [0.7000, 0.9000]"),
    *("+0.3000", "the intervals do not overlap"),
  )


@pytest.mark.parametrize(
  ("changes", "note"),
  [
    ({}, "equal in each fold"),
    ({"pairs_crc32c": "1"}, ""),
    ({"fold_accuracies": [0.7, 0.8]}, ""),
  ],
)
def test_the_error_of_the_difference_needs_the_same_pairs_and_a_difference(
  changes, note
):
  assert explain.figures(ROW, _changed(**changes))[0].note == note


def test_groups_that_both_have_are_compared():
  def grouped(**accuracies: float) -> dict:
    groups = [{"group": name, "accuracy": each} for name, each in accuracies.items()]
    return _changed() | {"by_group": {"groups": groups}}

  found = explain.figures(grouped(x=0.5, y=0.75), grouped(y=0.5, z=1.0))
  assert found[-1].cells() == ("accuracy, y", "0.7500", "0.5000", "-0.2500", "")
  assert len(explain.figures(ROW, grouped(y=0.5))) == 4


def test_the_text_names_the_files_the_reasons_and_the_figures():
  lines = explain.text(ROW, _changed(mirrored=False), "a.json", "b.json").splitlines()
  assert lines[:6] == [
    "A: lfw, step 1200, of a.json",
    "B: lfw, step 1200, of b.json",
    "",
    "They can differ because, the most important first:",
    "  1. A embeds each image together with its mirror image, B the image alone "
    "(--mirror):",
    "     all cosines differ.",
  ]
  assert "  - the pairs (40 in 4 folds)" in lines
  pixels = "60 images, 112 pixels wide, alignment arcface"
  assert f"  - the pixels of all images ({pixels})" in lines
  assert "  - the weights (iresnet50-512, step 1200, trained)" in lines
  assert lines[-1] == (
    "TAR at FAR 1e-1  0.5000 [0.4000, 0.6000]  0.5000 [0.4000, 0.6000]  +0.0000  "
    "the intervals overlap"
  )


@pytest.mark.parametrize(
  ("other", "says"),
  [
    (_changed(), "Nothing that a figure depends on differs, and the figures are equal"),
    (_changed(auc=0.8750001), "Nothing that is recorded differs, but the figures do."),
    (_older(), "Nothing that both record differs."),
  ],
)
def test_equal_rows_are_told_from_unexplained_and_from_older_ones(other, says):
  text = explain.text(ROW, other, "a", "b")
  assert says in text
  assert ("B of an earlier version" in text) == ("provenance" not in other)


def test_the_last_row_of_each_shared_set_is_taken_and_else_the_last_of_each():
  def rows(*names: str) -> list[dict]:
    return [_changed(set=name, step=n) for n, name in enumerate(names)]

  def chosen(a: list[dict], b: list[dict]) -> list[tuple]:
    pairs = explain.choose(a, b)
    return [(one["set"], one["step"], other["step"]) for one, other in pairs]

  both = chosen(rows("lfw", "cfp", "lfw"), rows("cfp", "lfw", "x"))
  assert both == [("lfw", 2, 1), ("cfp", 1, 0)]
  assert chosen(rows("lfw"), rows("x", "y")) == [("lfw", 0, 1)]


@pytest.mark.parametrize(
  "content",
  [
    json.dumps(ROW),
    json.dumps(ROW, indent=1) + "\n",
    json.dumps({"note": 1}) + "\n" + json.dumps(ROW) + "\n",
    json.dumps(ROW) + "\n" + json.dumps(ROW)[:30],
  ],
)
def test_a_file_is_one_row_or_a_line_each(tmp_path: pathlib.Path, content: str):
  path = tmp_path / "a.json"
  path.write_text(content)
  assert explain.read_scores(str(path)) == [ROW]


@pytest.mark.parametrize(
  ("content", "says"),
  [
    (b"", "a.json holds no score"),
    (b"\xff\xd8\xff\xe0\0\x10JFIF", "a.json is not JSON; give a metrics.jsonl"),
    (b'{"a": 1}\n{"a"\n{}\n', "a.json, line 2, is not JSON"),
    (b'{"model": "x", "embeddings": []}', "a.json holds no score"),
    (b"[]", "a.json holds no score"),
    (b"<html>", "a.json is a web page"),
    (None, "a.json does not exist"),
  ],
)
def test_a_file_without_scores_is_named(tmp_path: pathlib.Path, content, says):
  path = tmp_path / "a.json"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(errors.DataError, match=says):
    explain.read_scores(str(path))
