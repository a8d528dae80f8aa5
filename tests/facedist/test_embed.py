"""Embeddings of folders and shards with a fake network; the document and its errors."""

import json
import os
import pathlib
import tracemalloc

import cv2
import numpy as np
import pytest
from PIL import Image

from facedist import config, embed, errors, storage
from facedist.data import alignment, noise
from facedist.evaluation import embeddings_file
from facedist.training import inference
from facedist.training.checkpoint import checkpoints
from facedist.training.config import TrainConfig
from tests import face_model

SIZE = 16


class FakeNetwork:
  """Embeds an image as the red values of its top left and top right pixels."""

  image_size = SIZE
  embedding_size = 2

  def __init__(
    self, workdir: str, checkpoint: checkpoints.Checkpoint, *, weights: str, strategy
  ):
    self.name = f"fake-2@{checkpoint.name}"
    self.weights = "trained" if weights == "auto" else weights

  def embed(self, images: np.ndarray) -> np.ndarray:
    return images[:, 0, [0, -1], 0].astype(np.float32)


@pytest.fixture(autouse=True)
def _fake_network(monkeypatch) -> None:
  monkeypatch.setattr(inference, "load_network", FakeNetwork)


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> str:
  """A run with two checkpoints."""
  folder = tmp_path / "run" / "checkpoints"
  folder.mkdir(parents=True)
  (tmp_path / "run" / "config.json").write_text(config.to_json(TrainConfig()))
  for step in (100, 200):
    (folder / f"step-{step:08d}.index").write_bytes(b"")
    files = {"a": {"crc32c": step}}
    marker = {"step": step, "image_size": SIZE, "files": files}
    (folder / f"step-{step:08d}.json").write_text(json.dumps(marker))
  return str(tmp_path / "run")


@pytest.fixture
def faces(tmp_path: pathlib.Path) -> pathlib.Path:
  """Five images of two identities; left and right are (3, 4) times 10 to 50."""
  folder = tmp_path / "faces"
  for number, name in enumerate(["n1/1", "n1/2", "n2/1", "n2/2", "n2/3"], 1):
    _write(folder / f"{name}.png", left=30 * number, right=40 * number)
  return folder


def _write(path: pathlib.Path, *, left: int, right: int) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.full((SIZE, SIZE, 3), left, np.uint8)
  pixels[:, SIZE // 2 :] = right
  assert cv2.imwrite(str(path), pixels)


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


def test_images_of_the_networks_size_fit_without_a_line(workdir, faces, caplog):
  assert embed.main(_settings(workdir, faces)) == errors.ExitCode.DONE
  assert "were resized" not in caplog.text


def test_a_folder_becomes_one_document_in_sorted_order(workdir, faces):
  assert embed.main(_settings(workdir, faces)) == errors.ExitCode.DONE
  document = _document(workdir)
  entries = document.pop("embeddings")
  assert len(document.pop("weights_crc32c")) == 8
  assert document == {
    "model": "fake-2",
    "checkpoint": "step-00000200",
    "step": 200,
    "weights": "trained",
    "embedding_size": 2,
    "image_size": SIZE,
    "normalized": True,
    "mirrored": False,
    "skipped": [],
  }
  assert [(entry["path"], entry["identity"]) for entry in entries] == [
    ("n1/1.png", "n1"),
    ("n1/2.png", "n1"),
    ("n2/1.png", "n2"),
    ("n2/2.png", "n2"),
    ("n2/3.png", "n2"),
  ]
  np.testing.assert_allclose([e["embedding"] for e in entries], [[0.6, 0.8]] * 5)


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


def test_weights_are_told_apart_by_their_checksum(workdir, faces):
  found = {
    inference.weights_crc32c(checkpoint, weights)
    for checkpoint in checkpoints.list_checkpoints(workdir)
    for weights in ("trained", "ema")
  }
  assert len(found) == 4


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
    _write(faces / name, left=30, right=40)
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


def test_a_folder_of_other_files_says_what_it_holds(workdir, tmp_path):
  (tmp_path / "none").mkdir()
  (tmp_path / "none" / "1.gif").write_bytes(b"")
  with pytest.raises(errors.DataError, match=r"left out: files ending in \.gif: 1"):
    embed.main(_settings(workdir, tmp_path / "none"))


@pytest.mark.parametrize(
  "ending", [".BMP", ".jpe", ".jfif", ".webp", ".tif", ".TIFF", ".jp2", ".ppm"]
)
def test_images_of_every_kind_are_embedded(workdir, tmp_path, ending):
  pixels = np.full((SIZE, SIZE, 3), 30, np.uint8)
  pixels[:, SIZE // 2 :] = 40
  kind = {".jpe": "JPEG", ".jfif": "JPEG"}.get(ending)
  kind = kind or Image.registered_extensions()[ending.lower()]
  (tmp_path / "n1").mkdir()
  Image.fromarray(pixels).save(tmp_path / "n1" / f"1{ending}", kind)
  assert embed.main(_settings(workdir, tmp_path / "n1", normalize=False)) == 0
  (entry,) = _document(workdir)["embeddings"]
  np.testing.assert_allclose(entry["embedding"], [30, 40], atol=2)


def test_nothing_but_unreadable_images_is_a_document_without_embeddings(
  workdir, tmp_path
):
  (tmp_path / "bad").mkdir()
  for number in range(5):
    (tmp_path / "bad" / f"{number}.jpg").write_bytes(b"")
  settings = _settings(workdir, tmp_path / "bad")
  assert embed.main(settings) == errors.ExitCode.PARTIAL
  assert _document(workdir)["embeddings"] == []
  assert len(_document(workdir)["skipped"]) == 5


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
  settings = _settings(
    workdir, tmp_path / "photos", align=True, yunet=yunet, normalize=False
  )
  assert embed.main(settings) == errors.ExitCode.PARTIAL
  document = _document(workdir)
  assert document["skipped"] == [
    {"path": "n1/nobody.png", "reason": "no face was found"}
  ]
  warp, _ = cv2.estimateAffinePartial2D(points, alignment.TEMPLATE * SIZE / 112)
  aligned = cv2.warpAffine(photo, warp, (SIZE, SIZE))
  (entry,) = document["embeddings"]
  assert (entry["path"], entry["identity"]) == ("n1/face.png", "n1")
  np.testing.assert_allclose(entry["embedding"], aligned[0, [0, -1], 2], atol=1)
  assert document["alignment"] == {
    "template": "arcface",
    "detector": document["alignment"]["detector"],
    "face": "largest",
  }


def test_flags_of_alignment_that_do_nothing_are_refused(workdir, faces, tmp_path):
  (tmp_path / "manifest.json").write_text("{}")
  with pytest.raises(errors.UsageError, match="--align is for photos, but --input="):
    embed.main(_settings(workdir, tmp_path, align=True))
  with pytest.raises(errors.UsageError, match="--yunet=x is for --align; add it"):
    embed.main(_settings(workdir, faces, yunet="x"))


def test_shards_give_path_and_identity_from_the_record(workdir, tmp_path):
  folder = tmp_path / "shards"
  noise.write_noise_shards(
    str(folder),
    num_identities=3,
    images_per_identity=2,
    val_images_per_identity=1,
    image_size=SIZE,
    num_shards=2,
    seed=0,
  )
  with pytest.raises(errors.UsageError, match=r"several splits.*--split=train\|val"):
    embed.main(_settings(workdir, folder))
  assert embed.main(_settings(workdir, folder, split="val")) == errors.ExitCode.DONE
  entries = _document(workdir)["embeddings"]
  assert [(entry["path"], entry["identity"]) for entry in entries] == [
    (f"noise{identity:06d}/0002.jpg", f"noise{identity:06d}") for identity in range(3)
  ]


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
  made = noise.write_noise_shards(
    f"{bucket}/faces",
    num_identities=10,
    images_per_identity=10,
    val_images_per_identity=4,
    image_size=SIZE,
    num_shards=8,
    seed=0,
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


def test_a_set_of_one_split_needs_no_flag(workdir, tmp_path):
  folder = str(tmp_path / "pairs")
  noise.write_noise_verification_set(
    folder, num_pairs=3, folds=2, image_size=SIZE, seed=0
  )
  assert embed.main(_settings(workdir, folder)) == errors.ExitCode.DONE
  assert len(_document(workdir)["embeddings"]) == 6


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
  with pytest.raises(
    errors.UsageError, match=r"--plot=.*seen\.png exists; .*overwrite"
  ):
    embed.main(again)


@pytest.mark.parametrize(
  ("size", "name", "said"),
  [(512, "a.png", "2 or 3 floats, but .* 512"), (2, "a.jpg", r"must end in \.png")],
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_written(
  workdir, faces, monkeypatch, size, name, said
):
  monkeypatch.setattr(FakeNetwork, "embedding_size", size)
  with pytest.raises(errors.UsageError, match=said):
    embed.main(_settings(workdir, faces, plot=name))
  assert not os.path.exists(_output(workdir))


def test_an_embedding_without_a_direction_leaves_no_output(workdir, faces):
  _write(faces / "n3" / "black.png", left=0, right=0)
  with pytest.raises(errors.DataError, match=r"n3/black\.png as a vector that is zero"):
    embed.main(_settings(workdir, faces))
  assert os.listdir(os.path.dirname(_output(workdir))) == []


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"input": "FOLDER/none"}, "must be a folder"),
    ({"input": "FOLDER/n1/1.png"}, "is an image; give its folder"),
    ({"split": "val"}, "is for shards"),
  ],
)
def test_a_wrong_input_is_named_with_the_fix(workdir, faces, changes, said):
  changes = {
    name: value.replace("FOLDER", str(faces)) for name, value in changes.items()
  }
  settings = {"folder": changes.pop("input", str(faces))} | changes
  with pytest.raises(errors.UsageError, match=said):
    embed.main(_settings(workdir, **settings))


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
  lines = [
    "n1/2.png",
    f"{faces}/n2/1.png\tada",
    "",
    f"{bucket}/there/n2/3.png\t",
    "n9/0",
  ]
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
  [
    ("a.png\tx\ty", "line 1.*the identity"),
    ("\tx", "line 1"),
    ("\n", "lists no images"),
  ],
)
def test_a_list_that_is_none_is_refused(workdir, faces, content, said):
  (faces / "list.txt").write_text(content)
  with pytest.raises(errors.DataError, match=said):
    embed.main(_settings(workdir, faces / "list.txt"))


def test_a_folder_without_images_is_an_error(workdir, tmp_path):
  (tmp_path / "empty" / "n1").mkdir(parents=True)
  with pytest.raises(errors.DataError, match=r"has no images \(\.jpg, .*\)"):
    embed.main(_settings(workdir, tmp_path / "empty"))


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
  with pytest.raises(errors.UsageError, match="add --overwrite"):
    embed.main(settings)


def test_a_wrong_suffix_is_refused_before_anything_is_read(workdir, faces):
  output = _output(workdir).replace(".json", ".csv")
  with pytest.raises(errors.UsageError, match=r"must end in \.json, \.jsonl, \.npz, "):
    embed.main(_settings(workdir, faces, output=output))
  assert not os.path.exists(output)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".npz"])
def test_memory_does_not_grow_with_the_number_of_images(
  workdir, tmp_path, monkeypatch, suffix
):
  def embed_images(self, images: np.ndarray) -> np.ndarray:
    return np.ones((len(images), 512), np.float32)

  monkeypatch.setattr(FakeNetwork, "embed", embed_images)
  for name, count in (("warm", 100), ("few", 100), ("many", 800)):
    for number in range(count):
      _write(tmp_path / name / f"n{number // 10}" / f"{number}.png", left=1, right=2)
  peaks = []
  for name in ("warm", "few", "many"):
    tracemalloc.start()
    settings = {"output": str(tmp_path / f"out{suffix}"), "overwrite": True}
    embed.main(_settings(workdir, tmp_path / name, batch_size=8, **settings))
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  # 700 more embeddings of 2 kB, or pixels of 0.8 kB, would be 1.4 or 0.5 MB.
  # The names of an .npz, which are in memory, are 0.15 MB.
  assert peaks[2] - peaks[1] < (300_000 if suffix == ".npz" else 100_000)
