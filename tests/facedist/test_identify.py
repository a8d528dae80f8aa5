"""facedist.identify on files as facedist.embed writes them."""

import json
import pathlib

import numpy as np
import pytest

from facedist import errors, identify, storage
from facedist.evaluation import embeddings_file
from tests.facedist.test_search import write


@pytest.fixture
def faces(tmp_path: pathlib.Path) -> str:
  """Four people with two images each, 10 degrees apart; the people 60 degrees."""
  return write(
    tmp_path / "faces.json",
    *((f"p{n}/{i}.jpg", f"p{n}", 60 * n + 10 * i) for n in range(4) for i in range(2)),
  )


def test_a_labelled_set_is_scored_by_all_pairs_and_as_a_search(faces, tmp_path, capsys):
  groups = tmp_path / "groups.csv"
  lines = [f"p{n}/{i}.jpg,{'ab'[n // 2]}" for n in range(4) for i in range(2)]
  groups.write_text("\n".join(lines) + "\n")
  settings = identify.IdentifyConfig(embeddings=faces, groups=str(groups))
  assert identify.main(settings) == errors.ExitCode.DONE
  said = json.loads(capsys.readouterr().out)
  counts = {"num_same": 4, "num_different": 24}
  assert said["all_pairs"].items() >= counts.items()
  (point,) = said["all_pairs"]["tar_at_far"]
  assert (point["far"], point["tar"]) == (0.1, 1.0)
  assert said["identification"]["rank_1"] == 1.0
  (at,) = said["groups"]
  assert at["threshold"] == point["threshold"]
  rates = [(each["group"], each["tar"]) for each in at["groups"]]
  assert rates == [("a", 1.0), ("b", 1.0)]
  assert at["largest_tar_gap"] == 0.0
  facts = embeddings_file.load_embeddings(faces).facts
  assert facts.items() <= said["provenance"]["embeddings"].items()


def test_images_are_searched_in_a_gallery(faces, tmp_path, capsys):
  gallery = write(tmp_path / "gallery.json", ("x.jpg", "p0", 0), ("y.jpg", "p1", 60))
  identify.main(identify.IdentifyConfig(embeddings=faces, gallery=gallery))
  said = json.loads(capsys.readouterr().out)
  assert list(said) == ["identification", "provenance"]
  unit = np.array([[1.0, 0.0], [0.5, 0.75**0.5]], np.float32)
  loaded = embeddings_file.load_embeddings(gallery).embeddings
  np.testing.assert_allclose(loaded, unit, atol=1e-6)
  assert said["provenance"]["gallery"]["crc32c"] == (
    f"{storage.crc32c_of(loaded.tobytes()):08x}"
  )
  figures = {"num_probes": 4, "num_unmated": 4, "cmc": [1.0, 1.0]}
  assert said["identification"].items() >= figures.items()


def test_groups_and_a_gallery_exclude_each_other(faces):
  with pytest.raises(errors.UsageError, match="leave out one of them"):
    identify.main(identify.IdentifyConfig(faces, gallery=faces, groups="groups.csv"))


def test_files_of_two_networks_are_an_error(faces, tmp_path):
  other = write(tmp_path / "other.json", ("a", "a", 0), embedding_size=3)
  with pytest.raises(errors.DataError, match="embedding_size 2, but"):
    identify.main(identify.IdentifyConfig(embeddings=faces, gallery=other))


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ("p0/0.jpg\n", "line 1, is not image,group"),
    ("p0/0.jpg,a\np0/0.jpg,b\n", "line 2, gives p0/0.jpg a second group"),
    ("0.jpg,a\n", "names none of the 8 images, such as p0/0.jpg"),
  ],
)
def test_a_csv_that_gives_no_groups_is_named(faces, tmp_path, content, said):
  groups = tmp_path / "groups.csv"
  groups.write_text(content)
  with pytest.raises(errors.DataError, match=said):
    identify.main(identify.IdentifyConfig(embeddings=faces, groups=str(groups)))
