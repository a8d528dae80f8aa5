"""find_overlap: cosines by hand, and files as facedist.embed writes them."""

import collections
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from facedist import errors, storage
from facedist.evaluation.embeddings_file import JsonWriter
from tests.tfrecords_tools.folders import upload
from tfrecords_tools import find_overlap
from tfrecords_tools.overlap import centroids, similarity

FACTS = {
  "model": "resnet50",
  "checkpoint": "step-00000100",
  "step": 100,
  "weights_crc32c": "0a1b2c3d",
  "embedding_size": 2,
  "image_size": 112,
  "normalized": True,
  "mirrored": False,
}
Entries = Sequence[tuple[str, Sequence[float]]]
# The mean of ada's unit embeddings is (0.8, 0.6) + (0.8, -0.6) = (1, 0): its length
# before is 0.8. bob's first embedding has length 5 and counts as much as the other.
OURS: Entries = [
  ("ada", (0.8, 0.6)),
  ("bob", (3.0, 4.0)),
  ("ada", (0.8, -0.6)),
  ("bob", (0.6, 0.8)),
  ("cy", (-1.0, 0.0)),
]
OTHERS: Entries = [("Ada_L", (1.0, 0.0)), ("Bob", (0.0, 1.0)), ("Dot", (-0.8, 0.6))]
COSINES = {  # by hand
  "ada": {"Ada_L": 1.0, "Bob": 0.0, "Dot": -0.8},
  "bob": {"Ada_L": 0.6, "Bob": 0.8, "Dot": 0.0},
  "cy": {"Ada_L": -1.0, "Bob": 0.0, "Dot": 0.8},
}


def write(path: pathlib.Path, entries: Entries, **changes: object) -> str:
  """Writes a file with facedist.embed's own writer."""
  facts = FACTS | changes
  with JsonWriter(str(path), facts) as made:
    for number, (identity, embedding) in enumerate(entries):
      made.add(
        path=f"{identity}/{number}.jpg",
        identity=identity,
        embedding=np.array(embedding, np.float32),
      )
    made.skip(path="ada/broken.jpg", reason="no image")
  return str(path)


@pytest.fixture
def files(tmp_path: pathlib.Path) -> tuple[str, str]:
  return write(tmp_path / "ours.json", OURS), write(tmp_path / "others.json", OTHERS)


def run(files: tuple[str, str], report: pathlib.Path, **changes: Any) -> dict:
  """Runs the command in this process; returns its report."""
  find_overlap.main(find_overlap.OverlapConfig(*files, report=str(report), **changes))
  return json.loads(report.read_text())


@pytest.mark.parametrize("threshold", [-1.0, 0.5, 0.7, 0.9])
def test_pairs_above_the_threshold_are_reported_best_first(files, tmp_path, threshold):
  report = run(files, tmp_path / "report.json", threshold=threshold)
  found = {
    (pair["identity"], pair["other"]): pair["cosine"] for pair in report["pairs"]
  }
  expected = {
    (identity, other): cosine
    for identity, cosines in COSINES.items()
    for other, cosine in cosines.items()
    if cosine > threshold
  }
  assert found == pytest.approx(expected, abs=1e-6)
  cosines = [pair["cosine"] for pair in report["pairs"]]
  assert cosines == sorted(cosines, reverse=True)
  assert report["excluded"] == sorted({identity for identity, _ in expected})


def test_the_report_counts_images_and_tells_names_and_quantiles(files, tmp_path):
  meta = tmp_path / "meta.csv"
  meta.write_text('Class_ID, Name\nada, "Áda L"\nbob, "Rob"\n')
  report = run(files, tmp_path / "report.json", identity_meta=str(meta), threshold=0.9)
  assert report["format"] == "facedist-overlap-report"
  assert report["weights_crc32c"] == "0a1b2c3d"
  assert report["by_name"] is None
  (pair,) = report["pairs"]
  assert (pair["images"], pair["other_images"]) == (2, 1)
  assert (pair["name"], pair["same_name"]) == ("Áda L", True)
  # Sorted: -1, -0.8, three of 0, 0.6, two of 0.8, and 1; the fifth is the median.
  assert report["quantiles"]["all_pairs"]["0.5"] == pytest.approx(0.0, abs=1e-3)
  assert report["quantiles"]["all_pairs"]["1"] == pytest.approx(1.0, abs=1e-3)
  assert report["quantiles"]["best_matches"]["0.5"] == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(("threshold", "above"), [(-0.9, 3), (-0.5, 2), (0.1, 1)])
def test_what_a_threshold_means_is_measured_on_people_who_are_known(
  files, tmp_path, threshold, above
):
  # Pairs of different people: x and y 0, x and z -0.8, y and z 0.6. Halves: of x
  # (1, 0) and (1, 0), with cosine 1; of y (0, 1) and (0, -1) + 2 (0, 1), that is of
  # the 1st and 3rd and of the 2nd image, whose cosine is -1.
  known = [
    ("x", (1.0, 0.0)),
    ("y", (0.0, 1.0)),
    ("x", (2.0, 0.0)),
    ("y", (0.0, -1.0)),
    ("y", (0.0, 1.0)),
    ("z", (-0.8, 0.6)),
  ]
  others = write(tmp_path / "known.json", known)
  report = run((files[0], others), tmp_path / "report.json", threshold=threshold)
  assert report["false_match_rate"] == pytest.approx(above / 3)
  assert report["false_matches"] == pytest.approx(above / 3 * 9)
  assert report["miss_rate"] == pytest.approx(0.5)
  quantiles = report["quantiles"]
  assert quantiles["different_people"]["0.5"] == pytest.approx(0.0, abs=1e-3)
  assert quantiles["same_people"]["1"] == pytest.approx(1.0)


def test_a_single_person_tells_nothing_of_the_threshold(files, tmp_path, caplog):
  caplog.set_level("INFO", logger="absl")
  others = write(tmp_path / "one.json", OTHERS[:1])
  report = run((files[0], others), tmp_path / "report.json")
  assert report["false_match_rate"] is None
  assert report["miss_rate"] is None
  assert "--threshold=0.5: not measured" in caplog.text


def test_all_files_may_lie_in_a_bucket_whose_requests_fail(files, tmp_path, bucket):
  (tmp_path / "people.txt").write_text("1\nCy\t1\n")
  names, listed = str(tmp_path / "people.txt"), tmp_path / "excluded.txt"
  flags = {"lfw_names": names, "write_excluded": str(listed)}
  expected = run(files, tmp_path / "report.json", **flags)
  there = upload(tmp_path, f"{bucket}/in")
  bucket.faults.rate(0.2, seed=1, delay_seconds=0.05)
  outputs = {"report": f"{bucket}/report.json", "write_excluded": f"{bucket}/x.txt"}
  inputs = (f"{there}/ours.json", f"{there}/others.json")
  lists = {"lfw_names": f"{there}/people.txt"}
  find_overlap.main(find_overlap.OverlapConfig(*inputs, **lists, **outputs))
  assert bucket.traffic.faults().total() > 0
  bucket.faults.clear()
  found = json.loads(storage.read_bytes(outputs["report"]))
  assert found | dict(zip(("embeddings", "others"), files, strict=True)) == expected
  assert storage.read_bytes(outputs["write_excluded"]) == listed.read_bytes()


def test_people_found_by_name_are_excluded_with_those_found_by_face(files, tmp_path):
  (tmp_path / "people.txt").write_text("2\nCy\t1\nNobody\t3\n")
  listed = tmp_path / "excluded.txt"
  flags = {"lfw_names": str(tmp_path / "people.txt"), "write_excluded": str(listed)}
  report = run(files, tmp_path / "report.json", threshold=0.9, **flags)
  assert report["by_name"] == ["cy"]
  assert listed.read_text() == "ada\ncy\n"


def test_the_table_has_pairs_and_quantiles(files, tmp_path, capsys):
  run(files, tmp_path / "report.json")
  lines = capsys.readouterr().out.splitlines()
  assert lines[1].split() == ["1.0000", "ada", "Ada_L", "2", "/", "1"]
  assert lines[2].split() == ["0.8000", "bob", "Bob", "2", "/", "1", "(same", "name)"]
  assert lines[-3].startswith("quantiles of all pairs:")
  assert lines[-2].startswith("quantiles of best matches:")
  assert lines[-1].startswith("quantiles of different people:")


@pytest.mark.parametrize(
  ("entries", "fact"),
  [
    (OTHERS, {"weights_crc32c": "ffffffff"}),
    (OTHERS, {"model": "resnet100"}),
    (OTHERS, {"image_size": 224}),
    (OTHERS, {"mirrored": True}),
    ([("x", (1.0, 0.0, 0.0))], {"embedding_size": 3}),
  ],
)
def test_embeddings_of_another_network_are_refused(files, tmp_path, entries, fact):
  other = write(tmp_path / "other.json", entries, **fact)
  with pytest.raises(errors.DataError, match=f"other.json has {next(iter(fact))}"):
    find_overlap.main(find_overlap.OverlapConfig(files[0], other))


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    (lambda text: re.sub(r"(?m)^{\"path.*\n", "", text), "has no embeddings"),
    (lambda text: json.dumps(json.loads(text)), "line 1, is not the start"),
    (lambda text: json.dumps(json.loads(text), indent=1), "is no fact"),
    (lambda text: text[: text.index('"embeddings"')], "cut off"),
    (lambda text: text[: text.index("cy")], "is no embedding"),
    (lambda text: text.removesuffix("}\n"), "cut off at its end"),
    (lambda text: text.replace("[3, 4]", "[3]"), "line 12, has not the embedding_size"),
    (lambda text: text.replace("[3, 4]", "[0, 0]"), "line 12, has an embedding that"),
    (lambda text: text.replace("[3, 4]", "[NaN, 4]"), "line 12, has an embedding that"),
    (lambda text: text.replace("[3, 4]", '["x", 4]'), "line 12, is no embedding"),
    (lambda text: text.replace("[3, 4]", f"[{10**400}, 4]"), "is no embedding"),
    (lambda text: text.replace('"identity": "cy"', '"identity": null'), "no identity"),
    (lambda text: text.replace('"model"', '"other"'), "does not say its model"),
    (lambda text: text.replace('size": 2', 'size": -2'), "has embedding_size -2"),
    (lambda text: text.replace(": 100,", ": ,"), "line 4, is no fact"),
  ],
)
def test_a_file_that_is_not_as_embed_writes_it_is_named(files, change, reason):
  path = pathlib.Path(files[0])
  text = path.read_text()
  changed = change(text)
  assert changed != text
  path.write_text(changed)
  with pytest.raises(errors.DataError, match=reason) as caught:
    centroids.read_centroids(str(path))
  assert str(path) in str(caught.value)


def test_more_pairs_than_can_be_looked_through_are_refused(files, monkeypatch):
  monkeypatch.setattr(similarity, "MAX_PAIRS", 3)
  with pytest.raises(errors.UsageError, match="--threshold=-1 finds more than 3 pairs"):
    find_overlap.main(find_overlap.OverlapConfig(*files, threshold=-1.0))


_NUMBERS = st.integers(-99, 99).map(lambda number: number / 7)
_ENTRIES = st.lists(
  st.tuples(
    st.sampled_from("abcdefg"), st.tuples(_NUMBERS, _NUMBERS, _NUMBERS).filter(any)
  ),
  min_size=1,
  max_size=30,
)


@hypothesis.settings(
  max_examples=50,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(entries=_ENTRIES, block=st.integers(1, 4))
def test_reading_line_by_line_gives_what_reading_the_whole_gives(
  tmp_path, entries, block
):
  path = write(tmp_path / "some.json", entries, embedding_size=3)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(centroids, "_BLOCK", block)
    read = centroids.read_centroids(path)
  units = collections.defaultdict(list)
  for identity, embedding in entries:
    units[identity].append(np.array(embedding) / np.linalg.norm(embedding))
  assert list(read.names) == list(units)
  assert read.counts == [len(each) for each in units.values()]
  vectors = np.concatenate(read.blocks)
  for vector, each in zip(vectors, units.values(), strict=True):
    total = np.sum(each, axis=0)
    # Where embeddings all but cancel out, what is left is rounding.
    if (length := np.linalg.norm(total)) > 1e-2:
      np.testing.assert_allclose(vector, total / length, atol=1e-4)


def test_blocks_give_the_cosines_of_the_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(centroids, "_BLOCK", 3)
  random, files, units = np.random.default_rng(0), [], []
  for name, count in (("a", 8), ("b", 5)):
    rows = random.normal(size=(count, 4))
    entries = [(f"{name}{place}", tuple(row)) for place, row in enumerate(rows)]
    files.append(write(tmp_path / f"{name}.json", entries, embedding_size=4))
    units.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
  report = run((files[0], files[1]), tmp_path / "report.json", threshold=0.2)
  cosines = units[0] @ units[1].T
  assert {(pair["identity"], pair["other"]) for pair in report["pairs"]} == {
    (f"a{one}", f"b{other}") for one, other in np.argwhere(cosines > 0.2)
  }
  best = report["quantiles"]["best_matches"]
  assert best["0.05"] == pytest.approx(cosines.max(axis=1).min(), abs=1e-5)
  different = (units[1] @ units[1].T)[np.triu_indices(5, 1)]
  assert report["false_match_rate"] == pytest.approx((different > 0.2).mean())
  assert report["false_matches"] == pytest.approx((different > 0.2).mean() * 40)


# At 0.5, of the pairs of different people one of three is above, so 3 of the 9 compared
# are expected to be, and 4 were found: 75 %. At 0.7 none is.
@pytest.mark.parametrize(("threshold", "is_advised"), [(0.5, False), (0.7, True)])
def test_excluding_is_not_advised_where_most_matches_are_by_chance(
  files, tmp_path, caplog, threshold, is_advised
):
  caplog.set_level("INFO", logger="absl")
  report = run(files, tmp_path / "report.json", threshold=threshold)
  assert report["excluded"] == ["ada", "bob", "cy"]
  assert ("a fair score leaves them out" in caplog.text) == is_advised
  assert ("about 75 % of the pairs found are chance" in caplog.text) != is_advised


def test_where_no_pair_is_found_none_is_by_chance(tmp_path, caplog):
  # 1 of the 3 pairs of different people of the verification set is above 0.5.
  ours = write(tmp_path / "ours.json", [("cy", (0.0, -1.0))])
  others = write(tmp_path / "others.json", OTHERS)
  report = run((ours, others), tmp_path / "report.json")
  assert (report["pairs"], report["false_matches"]) == ([], pytest.approx(1))
  assert "chance matches" not in caplog.text


def test_the_command_ends_with_0_under_its_former_name_too(files):
  command = [sys.executable, "-m", "tfrecords_tools.overlap", "--threshold=0.7"]
  flags = [f"--embeddings={files[0]}", f"--others={files[1]}"]
  done = subprocess.run(
    [*command, *flags], capture_output=True, text=True, timeout=120, check=False
  )
  assert done.returncode == 0, done.stderr
  assert "3 of 3 identities are found" in done.stderr
