"""facedist.search on files as facedist.embed writes them."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from facedist import errors, search
from facedist.evaluation import embeddings_file

FACTS = {"embedding_size": 2, "weights_crc32c": "00000001", "mirrored": False}


def write(path: pathlib.Path, *images: tuple[str, str | None, float], **facts) -> str:
  """Writes a file of (path, identity, angle in degrees)."""
  with embeddings_file.new_file(str(path), FACTS | facts, overwrite=True) as out:
    for name, identity, degrees in images:
      angle = np.radians(degrees)
      vector = np.array([np.cos(angle), np.sin(angle)], np.float32)
      out.add(path=name, identity=identity, embedding=vector)
  return str(path)


@pytest.fixture
def files(tmp_path: pathlib.Path) -> dict[str, str]:
  """A gallery at 0, 60 and 120 degrees, and queries at 0 and 89."""
  gallery = (("ada/1.jpg", "ada", 0), ("bo/1.jpg", "bo", 60), ("3.jpg", None, 120))
  return {
    "gallery": write(tmp_path / "gallery.npz", *gallery),
    "query": write(tmp_path / "query.jsonl", ("q1.jpg", "ada", 0), ("q2.jpg", "", 89)),
  }


def test_matches_are_lines_with_the_best_first(files, capsys):
  settings = search.SearchConfig(**files, num_matches=2)
  assert search.main(settings) == errors.ExitCode.DONE
  assert capsys.readouterr().out.splitlines() == [
    "q1.jpg\t1\t1.0000\tada/1.jpg\tada",
    "q1.jpg\t2\t0.5000\tbo/1.jpg\tbo",
    "q2.jpg\t1\t0.8746\tbo/1.jpg\tbo",
    "q2.jpg\t2\t0.8572\t3.jpg\t",
  ]


def test_json_has_an_object_for_each_query_without_low_matches(files, capsys):
  search.main(search.SearchConfig(**files, json=True, min_cosine=0.9))
  first, second = map(json.loads, capsys.readouterr().out.splitlines())
  (match,) = first.pop("matches")
  assert match == {"path": "ada/1.jpg", "identity": "ada", "cosine": 1.0}
  assert first == {"query": "q1.jpg"}
  assert second == {"query": "q2.jpg", "matches": []}


def test_faiss_prints_the_same_lines(files, capsys):
  pytest.importorskip("faiss")
  search.main(search.SearchConfig(**files))
  lines = capsys.readouterr().out
  search.main(search.SearchConfig(**files, backend="faiss"))
  assert capsys.readouterr().out == lines


def test_without_faiss_its_flag_names_the_extra_and_a_large_gallery_is_searched(
  files, capsys, monkeypatch
):
  monkeypatch.setitem(sys.modules, "faiss", None)
  with pytest.raises(errors.UsageError, match=r"pip install 'facedist\[faiss\]'"):
    search.main(search.SearchConfig(**files, backend="faiss"))
  monkeypatch.setattr(search.search, "LARGE_GALLERY", 2)
  search.main(search.SearchConfig(**files, num_matches=1))
  assert capsys.readouterr().out.startswith("q1.jpg\t1\t1.0000\tada/1.jpg")


@pytest.mark.parametrize(
  ("fact", "value"), [("weights_crc32c", "00000002"), ("mirrored", True)]
)
def test_files_of_two_networks_are_an_error(files, tmp_path, fact, value):
  other = write(tmp_path / "other.npz", ("q.jpg", "a", 0), **{fact: value})
  with pytest.raises(errors.DataError, match=rf"{fact} {value}, but .*gallery\.npz"):
    search.main(search.SearchConfig(files["gallery"], other))


def test_a_reader_that_closes_the_pipe_ends_the_command_quietly(tmp_path):
  many = write(tmp_path / "many.npz", *((f"{n}.jpg", "a", n / 10) for n in range(900)))
  flags = ("--num_matches=100", f"--gallery={many}", f"--query={many}")
  command = (sys.executable, "-m", "facedist.search", *flags)
  done = subprocess.run(
    ["bash", "-c", 'set -o pipefail; "$@" | head -1', "bash", *command],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout == "0.jpg\t1\t1.0000\t0.jpg\ta\n"
  assert (done.returncode, "Error" in done.stderr) == (errors.ExitCode.DONE, False)
