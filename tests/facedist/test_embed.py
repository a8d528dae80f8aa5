"""Embeddings of folders and shards by a linear network; the document and its errors."""

import json
import os
import pathlib
import tracemalloc
from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from facedist import embed, errors, storage
from facedist.data import alignment, noise
from facedist.evaluation import embeddings_file
from facedist.training import inference
from facedist.training.checkpoint import checkpoints
from tests import face_model, noise_sets
from tests.facedist import pixel_runs
from tests.facedist.pixel_runs import SIZE


@pytest.fixture(scope="module", autouse=True)
def _backbone() -> Iterator[None]:
  with pixel_runs.backbone():
    yield


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> str:
  """A run with two checkpoints."""
  folder = pixel_runs.start(tmp_path / "run")
  pixel_runs.save(folder, 100, 200)
  return folder


@pytest.fixture
def faces(tmp_path: pathlib.Path) -> pathlib.Path:
  """Five images of two identities; left and right are (3, 4) times 10 to 50."""
  folder = tmp_path / "faces"
  for number, name in enumerate(["n1/1", "n1/2", "n2/1", "n2/2", "n2/3"], 1):
    pixel_runs.write_image(folder / f"{name}.png", left=30 * number, right=40 * number)
  return folder


def _settings(workdir: str, folder: object, **others) -> embed.EmbedConfig:
  settings = {"batch_size": 2, "output": _output(workdir)} | others
  return embed.EmbedConfig(workdir=workdir, input=str(folder), **settings)


def _output(workdir: str) -> str:
  return os.path.join(os.path.dirname(workdir), "out", "embeddings.json")


def _document(workdir: str) -> dict:
  return json.loads(pathlib.Path(_output(workdir)).read_text())


def test_images_of_other_sizes_are_counted_by_how_they_were_made_to_fit(
  workdir, tmp_path, caplog
):
  folder = tmp_path / "mixed"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for name, shape in (("a", (SIZE, SIZE)), ("b", (40, 40)), ("c", (SIZE, 30))):
    pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
    assert cv2.imwrite(str(folder / f"{name}.png"), pixels)
  assert embed.main(_settings(workdir, folder)) == errors.ExitCode.DONE
  assert (
    f"of 3 images, 2 were resized to {SIZE} x {SIZE}, and 1 that are not square were "
    "cut to the largest square in their middle first"
  ) in caplog.text


def test_a_folder_becomes_one_document_in_sorted_order(workdir, faces, caplog):
  assert embed.main(_settings(workdir, faces)) == errors.ExitCode.DONE
  document = _document(workdir)
  entries = document.pop("embeddings")
  assert len(document.pop("weights_crc32c")) == 8
  text = """{
    "model": "pixels-2", "checkpoint": "step-00000200", "step": 200,
    "weights": "trained", "embedding_size": 2, "image_size": 16, "normalized": true,
    "mirrored": false, "skipped": []
  }"""
  assert document == json.loads(text)
  names = ("n1/1.png", "n1/2.png", "n2/1.png", "n2/2.png", "n2/3.png")
  found = [(entry["path"], entry["identity"]) for entry in entries]
  assert found == [(name, name[:2]) for name in names]
  np.testing.assert_allclose([e["embedding"] for e in entries], [[0.6, 0.8]] * 5, 1e-6)
  assert "were resized" not in caplog.text


def test_raw_embeddings_of_an_older_checkpoint(workdir, faces):
  embed.main(_settings(workdir, faces, normalize=False, checkpoint="100"))
  document = _document(workdir)
  assert (document["step"], document["normalized"]) == (100, False)
  values = [entry["embedding"] for entry in document["embeddings"]]
  assert values == [[30 * n, 40 * n] for n in range(1, 6)]


def test_the_mirror_image_is_added(workdir, faces):
  embed.main(_settings(workdir, faces, normalize=False, mirror=True))
  document = _document(workdir)
  assert document["mirrored"] is True
  assert document["embeddings"][0]["embedding"] == [70, 70]


def test_weights_are_told_apart_by_their_checksum(workdir):
  pixel_runs.save(workdir, 300, kernel=2 * pixel_runs.EDGES)
  found = [
    inference.weights_crc32c(checkpoint, weights)
    for checkpoint in checkpoints.list_checkpoints(workdir)
    for weights in ("trained", "ema")
  ]
  assert found[:2] == found[2:4]  # steps 100 and 200 have the same
  assert len(set(found[2:])) == 4


def test_unreadable_images_are_named_and_the_exit_code_says_so(workdir, faces):
  (faces / "n1" / "0.jpg").write_bytes(b"no image")
  (faces / "n2" / "9.png").write_bytes((faces / "n2" / "1.png").read_bytes()[:-20])
  assert embed.main(_settings(workdir, faces)) == errors.ExitCode.PARTIAL
  document = _document(workdir)
  assert len(document["embeddings"]) == 5
  assert [each["path"] for each in document["skipped"]] == ["n1/0.jpg", "n2/9.png"]
  assert "cut off" in document["skipped"][0]["reason"]


def test_what_is_no_image_by_its_name_is_counted_in_the_log_and_the_document(
  workdir, faces, caplog
):
  for name in (".ipynb_checkpoints/1.png", "n1/@eaDir/1.png", "n1/1.png"):
    pixel_runs.write_image(faces / name, left=30, right=40)
  for name in ("n1/a.gif", "n1/b.GIF", "n1/Thumbs.db"):
    (faces / name).write_bytes(b"")
  assert embed.main(_settings(workdir, faces)) == errors.ExitCode.DONE
  document = _document(workdir)
  assert {entry["identity"] for entry in document["embeddings"]} == {"n1", "n2"}
  assert document["left_out"] == {
    "hidden or system files and folders": 3,
    "files ending in .gif": 2,
  }
  assert "hidden or system files and folders: 3, files ending in .gif: 2" in caplog.text


@pytest.mark.parametrize(
  ("file", "said"),
  [
    ("1.gif", r"left out: files ending in \.gif: 1"),
    (None, r"no images \(\.jpg, .*\)"),
  ],
)
def test_a_folder_without_images_is_an_error_that_says_what_it_holds(
  workdir, tmp_path, file, said
):
  (tmp_path / "none" / "n1").mkdir(parents=True)
  if file is not None:
    (tmp_path / "none" / file).touch()
  with pytest.raises(errors.DataError, match=said):
    embed.main(_settings(workdir, tmp_path / "none"))


def test_nothing_but_unreadable_images_is_a_document_without_embeddings(
  workdir, tmp_path
):
  (tmp_path / "bad").mkdir()
  for name in "abcde":  # in three batches
    (tmp_path / "bad" / f"{name}.jpg").touch()
  assert embed.main(_settings(workdir, tmp_path / "bad")) == errors.ExitCode.PARTIAL
  document = _document(workdir)
  assert (document["embeddings"], len(document["skipped"])) == ([], 5)


def test_faces_of_photos_are_aligned_and_the_document_says_how(workdir, tmp_path):
  (tmp_path / "cells.onnx").write_bytes(face_model.model())
  yunet = str(tmp_path / "cells.onnx")
  photo = np.full((200, 224, 3), 90, np.uint8)
  (tmp_path / "photos" / "n1").mkdir(parents=True)
  assert cv2.imwrite(str(tmp_path / "photos" / "n1" / "nobody.png"), photo)
  points = face_model.landmarks_of(3, 3)
  photo[:, : round(points[:, 0].mean())] += 60
  face_model.paint(photo, 3, 3)
  assert cv2.imwrite(str(tmp_path / "photos" / "n1" / "face.png"), photo)
  flags = {"align": True, "yunet": yunet, "normalize": False}
  done = embed.main(_settings(workdir, tmp_path / "photos", **flags))
  assert done == errors.ExitCode.PARTIAL
  document = _document(workdir)
  skipped = {"path": "n1/nobody.png", "reason": "no face was found"}
  assert document["skipped"] == [skipped]
  warp, _ = cv2.estimateAffinePartial2D(points, alignment.TEMPLATE * SIZE / 112)
  aligned = cv2.warpAffine(photo, warp, (SIZE, SIZE))
  (entry,) = document["embeddings"]
  assert (entry["path"], entry["identity"]) == ("n1/face.png", "n1")
  np.testing.assert_allclose(entry["embedding"], aligned[0, [0, -1], 2], atol=1)
  assert document["alignment"].pop("detector").startswith("cells.onnx ")
  assert document["alignment"] == {"template": "arcface", "face": "largest"}


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    ({"yunet": "x"}, "--yunet=x is for --align; add it"),
    ({"input": "n1/1.png"}, "is an image; give its folder"),
    ({"split": "val"}, "is for shards"),
    ({"output": "a.csv"}, r"--output=a\.csv must end in \.json, \.jsonl, \.npz, \.pa"),
    ({"plot": "a.jpg"}, r"--plot=a\.jpg must end in \.png"),
  ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_is_written(
  workdir, faces, flags, said
):
  folder = faces / flags.pop("input", "")
  with pytest.raises(errors.UsageError, match=said):
    embed.main(_settings(workdir, folder, **flags))
  assert not os.path.exists(_output(workdir))


def test_shards_give_path_and_identity_from_the_record(workdir, tmp_path):
  folder = tmp_path / "shards"
  noise_sets.write(folder, identities=3, images=2, val_images=1, shards=2)
  with pytest.raises(errors.UsageError, match=r"several splits.*--split=train\|val"):
    embed.main(_settings(workdir, folder))
  with pytest.raises(errors.UsageError, match="--align is for photos, but --input="):
    embed.main(_settings(workdir, folder, align=True))
  assert embed.main(_settings(workdir, folder, split="val")) == errors.ExitCode.DONE
  entries = _document(workdir)["embeddings"]
  found = [(entry["path"], entry["identity"]) for entry in entries]
  assert found == [(f"noise00000{n}/0002.jpg", f"noise00000{n}") for n in range(3)]


@pytest.mark.parametrize("kind", ["images", "shards"])
def test_all_paths_may_lie_in_a_bucket(workdir, faces, bucket, tmp_path, kind):
  if kind == "shards":
    faces = tmp_path / "pairs"
    noise.write_noise_verification_set(
      str(faces), num_pairs=3, folds=2, image_size=SIZE, seed=0
    )
  embed.main(_settings(workdir, faces))
  for folder, target in ((workdir, "run"), (str(faces), "in")):
    for entry in storage.walk(folder):
      storage.upload(f"{folder}/{entry.path}", f"{bucket}/{target}/{entry.path}")
  there = f"{bucket}/out/embeddings.json"
  bucket.faults.rate(0.1, seed=2)
  settings = _settings(
    f"{bucket}/run", f"{bucket}/in", output=there, cache_dir=str(tmp_path / "cache")
  )
  assert embed.main(settings) == errors.ExitCode.DONE
  bucket.faults.clear()
  assert storage.read_bytes(there) == storage.read_bytes(_output(workdir))
  with pytest.raises(errors.UsageError, match="add --overwrite"):
    embed.main(settings)


def test_a_cache_of_half_the_set_is_enough_and_only_the_split_is_fetched(
  workdir, bucket, tmp_path
):
  made = noise_sets.write(
    f"{bucket}/faces", identities=10, images=10, val_images=4, shards=8
  )
  shards = made.splits["train"].shards
  settings = _settings(
    workdir,
    f"{bucket}/faces",
    split="train",
    cache_dir=str(tmp_path / "cache"),
    cache_gb=(sum(shard.bytes for shard in shards) / 2 + 15_000) / 1e9,
  )
  assert embed.main(settings) == errors.ExitCode.DONE
  paths = [entry["path"] for entry in _document(workdir)["embeddings"]]
  assert len(set(paths)) == 100
  for shard in shards:
    assert bucket.traffic.bytes_read(f"{bucket}/faces/{shard.name}") == shard.bytes
  assert bucket.traffic.bytes_read("*/val-*.tfrecord") == 0
  kept = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tfrecord"))
  assert 0 < kept <= settings.cache_gb * 1e9


def test_shards_of_another_size_are_refused_with_the_fix(workdir, tmp_path):
  folder = str(tmp_path / "pairs")
  noise.write_noise_verification_set(
    folder, num_pairs=2, folds=2, image_size=32, seed=0
  )
  with pytest.raises(errors.UsageError, match=r"32 pixels wide.*--image_size=16"):
    embed.main(_settings(workdir, folder))


def test_an_output_that_is_there_is_kept_unless_told_otherwise(workdir, faces):
  embed.main(_settings(workdir, faces))
  with pytest.raises(errors.UsageError, match="add --overwrite"):
    embed.main(_settings(workdir, faces, checkpoint="100"))
  assert _document(workdir)["step"] == 200
  embed.main(_settings(workdir, faces, checkpoint="100", overwrite=True))
  assert _document(workdir)["step"] == 100


def test_a_picture_of_the_embeddings_is_written_on_demand(workdir, faces, bucket):
  settings = _settings(workdir, faces, plot=f"{bucket}/seen.png")
  assert embed.main(settings) == errors.ExitCode.DONE
  content = np.frombuffer(storage.read_bytes(f"{bucket}/seen.png"), np.uint8)
  assert cv2.imdecode(content, cv2.IMREAD_COLOR).shape[-1] == 3
  assert len(_document(workdir)["embeddings"]) == 5
  again = _settings(workdir, faces, output=f"{bucket}/b.json", plot=settings.plot)
  with pytest.raises(errors.UsageError, match=r"--plot=\S+seen.png exists; .*overwr"):
    embed.main(again)


def test_a_picture_of_many_floats_is_refused_before_anything_is_written(
  tmp_path, faces
):
  workdir = pixel_runs.start(tmp_path / "run", embedding_size=512)
  pixel_runs.save(workdir, 1, kernel=np.ones((SIZE * SIZE * 3, 512), np.float32))
  with pytest.raises(errors.UsageError, match=r"2 or 3 floats, but .* 512"):
    embed.main(_settings(workdir, faces, plot="a.png"))
  assert not os.path.exists(_output(workdir))


def test_an_embedding_without_a_direction_leaves_no_output(workdir, faces):
  pixel_runs.write_image(faces / "n3" / "black.png", left=0, right=0)
  with pytest.raises(errors.DataError, match=r"n3/black\.png as a vector that is zero"):
    embed.main(_settings(workdir, faces))
  assert os.listdir(os.path.dirname(_output(workdir))) == []


@pytest.mark.parametrize("folder", ["", "/", "/n1/"])
def test_a_bucket_and_a_folder_with_a_placeholder_are_no_list(
  workdir, faces, bucket, folder
):
  storage.upload(str(faces / "n1/1.png"), f"{bucket}/n1/1.png")
  storage.write_bytes(f"{bucket}/n1/", b"")  # as a console makes a folder
  assert embed.main(_settings(workdir, f"{bucket}{folder}")) == errors.ExitCode.DONE
  (entry,) = _document(workdir)["embeddings"]
  assert f"n1/{entry['path']}".endswith("n1/1.png")


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_list_names_images_and_identities(workdir, faces, bucket, is_remote):
  for name in ("n1/1.png", "n2/3.png"):
    storage.upload(str(faces / name), f"{bucket}/there/{name}")
  lines = ["n1/2.png", f"{faces}/n2/1.png\tada", ""]
  lines += [f"{bucket}/there/n2/3.png\t", "n9/0"]
  place = str(faces / "list.txt")
  if is_remote:
    place, lines[0] = f"{bucket}/there/list.txt", "n1/1.png"
  storage.write_bytes(place, "\n".join(lines).encode())
  assert embed.main(_settings(workdir, place)) == errors.ExitCode.PARTIAL
  document = _document(workdir)
  assert [(each["path"], each["identity"]) for each in document["embeddings"]] == [
    (lines[0], "n1"),
    (f"{faces}/n2/1.png", "ada"),
    (f"{bucket}/there/n2/3.png", None),
  ]
  assert [each["path"] for each in document["skipped"]] == ["n9/0"]


@pytest.mark.parametrize(
  ("content", "said"),
  [("a.png\tx\ty", "line 1.*identity"), ("\tx", "line 1"), ("\n", "lists no images")],
)
def test_a_list_that_is_none_is_refused(workdir, faces, content, said):
  (faces / "list.txt").write_text(content)
  with pytest.raises(errors.DataError, match=said):
    embed.main(_settings(workdir, faces / "list.txt"))


@pytest.mark.parametrize("suffix", [".jsonl", ".npz", ".parquet"])
def test_the_suffix_decides_the_format(workdir, faces, suffix):
  if suffix == ".parquet":
    pytest.importorskip("pyarrow")
  (faces / "n1" / "0.jpg").write_bytes(b"no image")
  output = os.path.join(os.path.dirname(workdir), f"faces{suffix}")
  settings = _settings(workdir, faces, output=output)
  assert embed.main(settings) == errors.ExitCode.PARTIAL
  assert embed.main(_settings(workdir, faces)) == errors.ExitCode.PARTIAL
  found = embeddings_file.load_embeddings(output, labelled=True)
  document = embeddings_file.load_embeddings(_output(workdir))
  assert found.facts == document.facts
  assert (found.paths, found.identities) == (document.paths, document.identities)
  np.testing.assert_allclose(found.embeddings, [[0.6, 0.8]] * 5, rtol=1e-6)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Folders of 100, 100 and 800 images."""
  folder = tmp_path_factory.mktemp("many")
  for name, count in (("warm", 100), ("few", 100), ("many", 800)):
    for number in range(count):
      path = folder / name / f"n{number // 10}" / f"{number}.png"
      pixel_runs.write_image(path, left=1, right=2)
  return folder


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".npz"])
def test_memory_does_not_grow_with_the_number_of_images(many, tmp_path, suffix):
  workdir = pixel_runs.start(tmp_path / "run", embedding_size=512)
  pixel_runs.save(workdir, 1, kernel=np.ones((SIZE * SIZE * 3, 512), np.float32))
  peaks = []
  for name in ("warm", "few", "many"):
    tracemalloc.start()
    settings = {"output": str(tmp_path / f"out{suffix}"), "overwrite": True}
    embed.main(_settings(workdir, many / name, batch_size=8, **settings))
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  # 700 more embeddings of 2 kB, or pixels of 0.8 kB, would be 1.4 or 0.5 MB.
  # The names of an .npz, which are in memory, are 0.15 MB.
  assert peaks[2] - peaks[1] < (300_000 if suffix == ".npz" else 100_000)
