"""Template protocols: pooling and figures against plain loops, and the lists."""

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest
from scipy import io
from sklearn import metrics

from facedist import errors
from facedist.evaluation import templates, verification
from facedist.evaluation.templates import Gallery


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({}, [2, 2]),  # the means of two media, 3 and 1, and 2
    ({"use_norms": False}, [1, 1]),
    ({"weights": np.array([1, 1, 0.5, 1])}, [2, 1]),
    ({"weights": np.array([1, 0.5, 0, 1]), "use_norms": False}, [1, 0]),
  ],
)
def test_a_template_is_the_mean_of_its_media(options, expected):
  embeddings = np.array([[3, 0], [1, 0], [0, 2], [0, -5]], np.float32)
  numbers, pooled = templates.pool(
    embeddings, np.array([7, 7, 7, 4]), np.array([1, 1, 2, 1]), **options
  )
  assert numbers.tolist() == [4, 7]
  np.testing.assert_allclose(pooled[1], np.array(expected) / np.linalg.norm(expected))
  np.testing.assert_allclose(pooled[0], [0, -1])  # its medium 1 is another one's too


def test_many_templates_are_pooled_as_one_by_one():
  rng = np.random.default_rng(0)
  embeddings = rng.standard_normal((7000, 3)).astype(np.float32)
  exact = embeddings.astype(np.float64)
  image_of = rng.integers(7000, size=15_000)
  numbers = rng.integers(900, size=15_000)
  numbers[:5000] = 17  # more than fit in a step
  media = rng.integers(4, size=15_000)
  weights = rng.random(15_000)
  found, pooled = templates.pool(
    embeddings, numbers, media, weights=weights, rows=image_of
  )
  assert found.tolist() == sorted(set(numbers.tolist()))
  for number, vector in zip(found, pooled, strict=True):
    total = np.zeros(3)
    for medium in range(4):
      mine = np.flatnonzero((numbers == number) & (media == medium))
      if len(mine):
        total += np.mean([weights[i] * exact[image_of[i]] for i in mine], axis=0)
    np.testing.assert_allclose(vector, total / np.linalg.norm(total), rtol=1e-9)


def test_images_that_cancel_out_are_an_error():
  opposite = np.array([[1, 0], [-1, 0]], np.float32)
  with pytest.raises(errors.DataError, match="template 5 add up to"):
    templates.pool(opposite, np.array([5, 5]), np.array([1, 1]))


@pytest.mark.parametrize("num_pairs", [10, 9000])  # few and most of all pairs
def test_scores_of_pairs_are_cosines(num_pairs):
  rng = np.random.default_rng(1)
  pooled = rng.standard_normal((1000 if num_pairs < 100 else 40, 8))
  pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
  first, second = rng.integers(len(pooled), size=(2, num_pairs), dtype=np.int32)
  found = templates.pair_scores(pooled, first, second)
  np.testing.assert_allclose(found, (pooled @ pooled.T)[first, second], atol=1e-12)


def _nearest(same: np.ndarray, scores: np.ndarray, limit: float) -> tuple[float, float]:
  """Returns FAR and TAR as InsightFace's evaluation reads them."""
  far, tar, _ = metrics.roc_curve(same, scores)
  points = list(zip(far.tolist(), tar.tolist(), strict=True))[::-1]
  return min(points, key=lambda point: abs(point[0] - limit))  # the first of equals


@pytest.mark.parametrize("steps", [6, 30, 10**6])  # many ties, some, and none
def test_rates_are_those_of_a_loop_over_thresholds(steps):
  rng = np.random.default_rng(steps)
  same = rng.random(3000) < 0.2
  scores = np.round(np.clip(rng.normal(0.4 * same, 0.3), -1, 1) * steps) / steps
  found = templates.verify(scores, same)
  assert found.num_same == same.sum()
  assert found.auc == metrics.roc_auc_score(same, scores)
  assert [at.far for at in found.tar_at_far] == [1e-1, 1e-2, 1e-3]
  for at in found.tar_at_far:
    best, lowest = 0.0, 2.0
    for threshold in set(scores.tolist()):
      if np.mean(scores[~same] >= threshold) <= at.far:
        best = max(best, float(np.mean(scores[same] >= threshold)))
        lowest = min(lowest, threshold)
    assert (at.tar, at.threshold) == (best, lowest)
    assert (at.nearest_far, at.nearest_tar) == _nearest(same, scores, at.far)
    assert (at.low, at.high) == (None, None)


@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_intervals_are_those_of_resampled_subjects(spread):
  # of few subjects the weights vary so much that now and then all pairs are visited
  rng = np.random.default_rng(3)
  subjects = rng.integers(9, size=(9000, 2)).astype(np.int32)
  same = subjects[:, 0] == subjects[:, 1]
  of_subject = rng.normal(0, spread, 9)[subjects].sum(axis=1)
  scores = np.round(rng.normal(0.5 * same + of_subject, 0.2), 2)
  found = templates.verify(scores, same, subjects=subjects, resamples=100)
  expected = verification.tar_with_intervals(
    scores, same, identities=subjects, resamples=100
  )
  for at, wanted in zip(found.tar_at_far, expected, strict=True):
    assert dataclasses.asdict(at).items() >= dataclasses.asdict(wanted).items()


def test_pairs_of_one_kind_are_an_error():
  with pytest.raises(errors.DataError, match="2 pairs of one person and 0 of two"):
    templates.verify(np.array([0.1, 0.2]), np.array([True, True]))


def test_ranks_and_open_sets_are_those_of_loops():
  rng = np.random.default_rng(5)
  subjects = np.arange(60)
  pooled = rng.standard_normal((60 + 400, 6))
  of_probe = rng.integers(60, size=400)
  pooled[60:] += 2 * pooled[of_probe]
  pooled = np.round(pooled / np.linalg.norm(pooled, axis=1, keepdims=True), 1)
  galleries = [
    Gallery("G1", np.arange(30), subjects[:30]),
    Gallery("G2", np.arange(30, 60), subjects[30:]),
  ]
  found = templates.identify(
    pooled, Gallery("probe", np.arange(60, 460), of_probe), galleries
  )
  assert (found.num_probes, found.num_subjects) == (400, 60)
  cosines = pooled[60:] @ pooled[:60].T
  # a tie counts against the probe
  ranks = np.sum(cosines >= cosines[np.arange(400), of_probe, np.newaxis], axis=1)
  for count, rate in ((1, found.rank_1), (5, found.rank_5), (10, found.rank_10)):
    assert rate == np.mean(ranks <= count)
  for gallery, open_set in zip(galleries, found.open_sets, strict=True):
    mated, unmated = [], []
    for row, subject in zip(cosines[:, gallery.places], of_probe, strict=True):
      if subject in gallery.subjects:
        mate = row[gallery.subjects == subject][0]
        is_found = np.sum(row >= mate) == 1
        mated.append(mate if is_found else -np.inf)
      else:
        unmated.append(row.max())
    assert (open_set.num_mated, open_set.num_unmated) == (len(mated), len(unmated))
    assert [at.fpir for at in open_set.tpir_at_fpir] == [0.1, 0.01]
    for at in open_set.tpir_at_fpir:
      rates = [
        np.mean(np.array(mated) > threshold)
        for threshold in [*unmated, *mated]
        if np.mean(np.array(unmated) > threshold) <= at.fpir
      ]
      assert at.tpir == max(rates)
  assert [at.tpir for at in found.tpir_at_fpir] == [
    np.mean([each.tpir_at_fpir[n].tpir for each in found.open_sets]) for n in (0, 1)
  ]
  mates = cosines[np.arange(400), of_probe]
  others = np.sort(cosines[of_probe[:, np.newaxis] != subjects])[::-1]
  assert [at.tpir for at in found.pairwise_tpir_at_fpir] == [
    np.mean(mates > others[count - 1]) for count in (40, 4)
  ]


def test_a_search_ranks_images_and_counts_ties_against_the_probe():
  angles = np.radians([0, 40, 10, 10, 20, 90])
  gallery = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
  identities = np.array([1, 1, 2, -1, -1, -1])
  probes = gallery[[0, 2, 4]]
  found = templates.search_images(probes, np.array([1, 2, 1]), gallery, identities)
  # rank 1; a tie with a distractor: 2; 10, 10 and 20 degrees, and 0 and 40 tie: 4
  assert found.cmc[:5] == (1 / 3, 2 / 3, 2 / 3, 1.0, 1.0)
  assert (found.rank_1, found.rank_5, found.num_gallery) == (1 / 3, 1.0, 6)


def test_a_probe_without_a_mate_is_an_error():
  one = np.ones((1, 1), np.float32)
  with pytest.raises(errors.DataError, match=r"1 of 1 probes .* identity 4"):
    templates.search_images(one, np.array([4]), one, np.array([-1]))


POINTS = "38 51 73 51 56 71 41 92 70 92 0.5"
LISTS = {
  "name_5pts_score.txt": "".join(f"{name}.jpg {POINTS}\n" for name in "123x"),
  "face_tid_mid.txt": "1.jpg 7 1\n2.jpg 7 1\n3.jpg 4 1\n1.jpg 9 2\n",
  "template_pair_label.txt": "7 9 1\n7 4 0\n4 9 0\n",
}
SEARCHES = {
  "1N_gallery_G1.csv": "TEMPLATE_ID,SUBJECT_ID,FILENAME\n7,70,a\n7,70,b\n",
  "1N_gallery_G2.csv": "TEMPLATE_ID,SUBJECT_ID\n4,40\n",
  "1N_probe_mixed.csv": "TEMPLATE_ID,SUBJECT_ID\n9,70\n",
}


def _write(folder: pathlib.Path, lists: dict[str, str]) -> str:
  """Writes the lists of IJB-C."""
  (folder / "meta").mkdir(exist_ok=True)
  for name, text in lists.items():
    (folder / "meta" / f"ijbc_{name}").write_bytes(text.encode())
  return str(folder)


@pytest.mark.parametrize(
  "change",
  [
    lambda text: text,
    lambda text: text.replace(" ", "\t"),
    lambda text: text.replace("\n", "\r\n"),
    lambda text: "\ufeff" + text,
    lambda text: "\n" + text.replace(" ", "  ") + "\n\n",
    lambda text: text.rstrip("\n"),
  ],
)
def test_the_lists_of_ijb_are_read_in_all_their_forms(tmp_path, change):
  lists = {name: change(text) for name, text in LISTS.items()} | SEARCHES
  read = templates.read_ijb(_write(tmp_path, lists), "ijbc")
  assert read.names == ["1.jpg", "2.jpg", "3.jpg"]  # x.jpg is in no template
  assert read.landmarks[0].ravel().tolist() == list(map(float, POINTS.split()[:-1]))
  assert read.face_scores.tolist() == [0.5] * 3
  expected = {"templates": [4, 7, 9], "image_of": [0, 1, 2, 0]}
  expected |= {"template_of": [1, 1, 0, 2], "medium_of": [1, 1, 1, 2]}
  expected |= {"first": [1, 1, 0], "second": [2, 0, 2], "same": [True, False, False]}
  for name, values in expected.items():
    assert getattr(read, name).tolist() == values, name
  galleries = [(each.name, each.places.tolist()) for each in read.galleries]
  assert galleries == [("G1", [1]), ("G2", [0])]
  assert read.probes is not None
  assert read.probes.subjects.tolist() == [70]
  assert read.subject_of.tolist() == [40, 70, 70]
  (tmp_path / "plain").mkdir()
  plain = templates.read_ijb(_write(tmp_path / "plain", LISTS | SEARCHES), "ijbc")
  assert templates.crc32c(read) == templates.crc32c(plain)
  plain.galleries[1].subjects[0] = 41
  assert templates.crc32c(read) != templates.crc32c(plain)


def test_the_files_of_a_search_may_be_absent(tmp_path):
  read = templates.read_ijb(_write(tmp_path, LISTS), "ijbc")
  assert (read.galleries, read.probes) == ((), None)
  assert read.subject_of.tolist() == [-1] * 3


@pytest.mark.parametrize(
  ("name", "text", "said"),
  [
    ("name_5pts_score.txt", "1.jpg 1 2\n", "line 1, has 3 fields instead of 12"),
    ("name_5pts_score.txt", f"1.jpg {POINTS[:-3]}nan\n", "line 1, .* no finite number"),
    ("name_5pts_score.txt", f"1.jpg {POINTS}\n" * 2, "line 2, names 1.jpg a second"),
    ("name_5pts_score.txt", "", "is empty"),
    ("face_tid_mid.txt", "1.jpg 7 1\ny.jpg 7 1\n", "line 2, names y.jpg, which is not"),
    ("face_tid_mid.txt", "1.jpg 7\n", "line 1, has 2 fields instead of 3"),
    ("face_tid_mid.txt", "1.jpg seven 1\n", "line 1, has seven where a whole number"),
    ("template_pair_label.txt", "7 9 1\n\n7 5 0\n", "line 3, names template 5, which"),
    ("template_pair_label.txt", "7 9 1\n7 4\n", "line 2, has 2 fields instead of 3"),
    ("template_pair_label.txt", "7 9 1\n7 4 0.5\n", "line 2, has 0.5 where a whole"),
    ("template_pair_label.txt", "7 9 2\n", "line 1, has the label 2; write 1"),
    ("template_pair_label.txt", "7 3000000000 1\n", "line 1, has 3000000000, which"),
    ("template_pair_label.txt", "7 9 1 0\n", "line 1, has 4 fields instead of 3"),
    ("template_pair_label.txt", "", "is empty"),
    ("template_pair_label.txt", "\n", "is empty"),
    ("template_pair_label.txt", None, "does not exist"),
    ("1N_gallery_G1.csv", "t,s\n7,70\n5,50\n", "line 3, names template 5, which has"),
    ("1N_gallery_G1.csv", "t,s\n7,70\n7,71\n", "line 3, gives template 7 a second"),
    ("1N_gallery_G1.csv", "t,s\n", "names no template"),
    ("1N_gallery_G1.csv", "t,s\n7\n", "line 2, is not template,subject"),
    ("1N_probe_mixed.csv", None, "G1.csv is there, but .*probe_mixed.csv is not"),
  ],
)
def test_a_wrong_list_is_named_with_its_line(tmp_path, name, text, said):
  _write(tmp_path, LISTS | SEARCHES)
  if text is None:
    (tmp_path / "meta" / f"ijbc_{name}").unlink()
  else:
    _write(tmp_path, {name: text})
  with pytest.raises(errors.DataError, match=said) as caught:
    templates.read_ijb(str(tmp_path), "ijbc")
  assert f"ijbc_{name}" in str(caught.value)


TINY = {
  "Gallery_Match": ("1_1.jpg", "2_1.jpg", "2_2.jpg"),
  "Gallery_Distractor": ("a.jpg", "b.jpg"),
  "Probe": ("2_3.jpg", "1_2.jpg"),
}


def _write_tinyface(folder: pathlib.Path) -> None:
  """Makes TinyFace's folders, of empty files."""
  for part, names in TINY.items():
    (folder / part).mkdir(parents=True)
    for name in names:
      (folder / part / name).touch()


def _write_mat(path: pathlib.Path, kind: str, images: dict[str, int]) -> None:
  """Writes a list as TinyFace's release has it: cells of text, and a column."""
  cells = np.empty((len(images), 1), object)
  cells[:, 0] = list(images)
  identities = np.array(list(images.values())).reshape(-1, 1)
  io.savemat(path, {f"{kind}_set": cells, f"{kind}_ids": identities})


@pytest.mark.parametrize("below", ["", "Testing_Set/"])
def test_tinyface_is_read_by_its_names(tmp_path, below):
  _write_tinyface(tmp_path / below)
  read = templates.read_tinyface(str(tmp_path))
  parts = [f"{below}{part}/{name}" for part in TINY for name in sorted(TINY[part])]
  assert read.names == parts
  assert read.identities.tolist() == [1, 2, 2, -1, -1, 1, 2]
  assert read.num_gallery == 5


def test_tinyfaces_lists_decide_which_images_count(tmp_path):
  _write_tinyface(tmp_path)
  gallery = tmp_path / "gallery_match_img_ID_pairs.mat"
  _write_mat(gallery, "gallery", {"2_1.jpg": 12, "1_1.jpg": 11})
  _write_mat(tmp_path / "probe_img_ID_pairs.mat", "probe", {"2_3.jpg": 12})
  read = templates.read_tinyface(str(tmp_path))
  names = [name.partition("/")[2] for name in read.names]
  assert names == ["2_1.jpg", "1_1.jpg", "a.jpg", "b.jpg", "2_3.jpg"]
  assert read.identities.tolist() == [12, 11, -1, -1, 12]
  _write_mat(gallery, "gallery", {"2_1.jpg": 12, "9_9.jpg": 11})
  with pytest.raises(errors.DataError, match="1 images that are not there, such as 9_"):
    templates.read_tinyface(str(tmp_path))
  _write_mat(gallery, "probe", {"2_1.jpg": 12})
  for content in (gallery.read_bytes(), b"no list" * 100):
    gallery.write_bytes(content)
    with pytest.raises(errors.DataError, match="is not TinyFace's list of gallery_set"):
      templates.read_tinyface(str(tmp_path))


def test_a_wrong_tinyface_folder_is_named(tmp_path):
  _write_tinyface(tmp_path)
  (tmp_path / "Probe" / "noone.jpg").touch()
  with pytest.raises(errors.DataError, match=r"noone\.jpg has no identity before an _"):
    templates.read_tinyface(str(tmp_path))
  shutil.rmtree(tmp_path / "Gallery_Distractor")
  with pytest.raises(errors.DataError, match="no images in Gallery_Distractor"):
    templates.read_tinyface(str(tmp_path))
