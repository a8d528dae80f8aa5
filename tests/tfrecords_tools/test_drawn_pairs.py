import collections
import csv
import itertools
import shutil

import numpy as np
import pytest

from facedist import errors
from facedist.data import verification_set
from facedist.data.readers import local_reader
from facedist.data.shards import manifest
from tests.tfrecords_tools import folders
from tests.tfrecords_tools.conftest import draw_image, jpeg_of
from tfrecords_tools import build, inspect, verify
from tfrecords_tools.sources import drawn_pairs

PATHS = {
  f"p{n:02d}": [f"p{n:02d}/{k}.jpg" for k in range(1 + n % 4)] for n in range(80)
}


def test_folds_have_distinct_identities_and_as_many_pairs_of_each_kind():
  pairs = drawn_pairs.draw(PATHS, num_pairs=100, seed=3)
  assert len({frozenset((pair.first, pair.second)) for pair in pairs}) == 100
  people = collections.defaultdict(set)
  for pair in pairs:
    first, second = pair.first[:3], pair.second[:3]
    assert (first == second) == pair.same
    assert pair.first != pair.second
    people[pair.fold] |= {first, second}
  assert sorted(people) == list(range(10))
  for one, other in itertools.combinations(people.values(), 2):
    assert not one & other
  kinds = collections.Counter((pair.fold, pair.same) for pair in pairs)
  assert set(kinds.values()) == {5}


def test_the_order_of_files_changes_nothing_and_the_seed_does():
  backwards = {name: paths[::-1] for name, paths in reversed(PATHS.items())}
  drawn = drawn_pairs.draw(PATHS, num_pairs=60, seed=0)
  assert drawn_pairs.draw(backwards, num_pairs=60, seed=0) == drawn
  assert drawn_pairs.draw(PATHS, num_pairs=60, seed=1) != drawn


def test_the_pairs_of_a_seed_never_change():
  # Written down once: another machine or version must draw these.
  drawn = drawn_pairs.draw(PATHS, num_pairs=20, seed=0)
  assert [(pair.first, pair.second) for pair in drawn[:4]] == [
    ("p11/1.jpg", "p11/0.jpg"),
    ("p21/0.jpg", "p19/1.jpg"),
    ("p58/1.jpg", "p58/0.jpg"),
    ("p29/1.jpg", "p58/0.jpg"),
  ]


def test_every_pair_is_drawn_where_no_more_exist():
  paths = {f"p{n:02d}": [f"p{n:02d}/{k}.jpg" for k in range(2)] for n in range(20)}
  drawn = drawn_pairs.draw(paths, num_pairs=40, seed=0)
  assert sum(pair.same for pair in drawn) == 20
  message = r"needs 3 pairs .* --make_pairs=40 is pos"
  with pytest.raises(errors.UsageError, match=message):
    drawn_pairs.draw(paths, num_pairs=60, seed=0)
  with pytest.raises(errors.UsageError, match=r"20 identities .* take a larger set"):
    drawn_pairs.draw({n: p[:1] for n, p in paths.items()}, num_pairs=20, seed=0)


def test_each_identity_with_several_images_is_as_likely_as_another():
  paths = {
    f"p{n:03d}": [f"p{n:03d}/{k}.jpg" for k in range(200 if n % 2 else 50)]
    for n in range(40)
  }
  drawn = drawn_pairs.draw(paths, num_pairs=8000, seed=0)
  counts = collections.Counter(pair.first[:4] for pair in drawn if pair.same)
  # 400 a fold over 4 identities: 100 each, with a standard deviation below 10
  assert len(counts) == 40
  assert max(abs(count - 100) for count in counts.values()) < 40


@pytest.fixture
def faces(tmp_path):
  """.../faces with 80 identities of 1 to 4 drawn images."""
  for number, path in enumerate(itertools.chain.from_iterable(PATHS.values())):
    place = tmp_path / "faces" / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(jpeg_of(draw_image(number, 112, 112)))
  return tmp_path / "faces"


def test_a_labelled_set_becomes_a_verification_set_and_a_csv(faces, build_config):
  config = build_config(faces, make_pairs=60, seed=5)
  assert build.main(config) == errors.ExitCode.DONE
  verify.main(verify.VerifyConfig(data_dir=config.output_dir))
  inspect.main(inspect.InspectConfig(data_dir=config.output_dir))
  made = manifest.load(config.output_dir)
  assert (made.source["make_pairs"], made.source["seed"]) == (60, 5)
  found = verification_set.load_verification_set(config.output_dir)
  reader = local_reader.open_reader(config.output_dir, "images")
  jpegs, _ = reader.read(np.arange(found.num_images))
  with open(f"{config.output_dir}/pairs.csv", newline="") as stream:
    rows = list(csv.DictReader(stream))
  assert len(rows) == len(found.same) == 60
  for row, first, second, same, fold in zip(
    rows, found.first, found.second, found.same, found.folds, strict=True
  ):
    assert bytes(jpegs[first]) == (faces / row["image1"]).read_bytes()
    assert bytes(jpegs[second]) == (faces / row["image2"]).read_bytes()
    assert (int(row["same"]), int(row["fold"])) == (same, fold)


def test_the_csv_and_tasks_give_the_same_set(faces, build_config, tmp_path):
  config = build_config(faces, make_pairs=60, seed=5)
  build.main(config)
  whole = folders.files_of(config.output_dir)
  again = {"output_dir": str(tmp_path / "again")}
  csv_file = f"{config.output_dir}/pairs.csv"
  build.main(build_config(faces, dataset="pairs", pairs=csv_file, **again))
  same = folders.files_of(again["output_dir"]).items() & whole.items()
  shards = {name for name in whole if name.endswith((".tfrecord", ".npy"))}
  assert shards <= dict(same).keys()
  shutil.rmtree(again["output_dir"])
  for task in ({"task_index": 0}, {"task_index": 1}, {"finalize": True}):
    parts = {"make_pairs": 60, "seed": 5, "num_tasks": 2}
    build.main(build_config(faces, **parts, **again, **task))
  assert folders.files_of(again["output_dir"]) == whole


def test_a_broken_image_ends_the_build(faces, build_config):
  for path in faces.rglob("*.jpg"):
    path.write_bytes(b"cut off")
  with pytest.raises(errors.DataError, match="--make_pairs needs every image"):
    build.main(build_config(faces, make_pairs=60))


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"make_pairs": 50}, "no multiple of 20, .*try --make_pairs=40"),
    ({"make_pairs": 3}, "try --make_pairs=20"),
    ({"make_pairs": 60, "val_fraction": 0.1}, "--val_fraction=0.1 is for training"),
    ({"make_pairs": 60, "dataset": "npz"}, "--make_pairs=60 is not for --dataset=npz"),
  ],
)
def test_flags_that_do_not_fit_are_refused(faces, build_config, changes, words):
  with pytest.raises(errors.UsageError, match=words):
    build.main(build_config(faces, **changes))
