"""Embeddings by several devices and several processes are those of one."""

import json
import pathlib
import shutil

import cv2
import numpy as np
import pytest
import tensorflow as tf

from facedist import storage
from facedist.data import image_source
from facedist.data.cache import staged_dataset
from facedist.distributed.detect import free_addresses
from facedist.training import inference
from facedist.training.checkpoint import checkpoints
from tests import processes

RECORDED = pathlib.Path(__file__).parent / "recorded"


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
  """A copy of the recorded run."""
  return pathlib.Path(shutil.copytree(RECORDED / "run", tmp_path / "run"))


@pytest.fixture
def faces(tmp_path: pathlib.Path) -> pathlib.Path:
  """Nine images of noise, the third and the last of which are none."""
  pixels = np.random.default_rng(0).integers(0, 256, (9, 28, 28, 3), np.uint8)
  for number, image in enumerate(pixels):
    path = tmp_path / "faces" / f"n{number // 2}" / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)
    if number in (2, 8):
      path.write_bytes(b"no image")
  return tmp_path / "faces"


def test_replicas_share_a_batch(workdir, two_replicas: tf.distribute.MirroredStrategy):
  (checkpoint,) = checkpoints.list_checkpoints(str(workdir))
  alone = inference.load_network(str(workdir), checkpoint)
  shape = (6, alone.image_size, alone.image_size, 3)
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  together = inference.load_network(str(workdir), checkpoint, strategy=two_replicas)
  np.testing.assert_allclose(
    together.embed(images), alone.embed(images).numpy(), rtol=1e-5, atol=1e-6
  )


@pytest.mark.slow
def test_workers_share_the_images(workdir, faces, tmp_path):
  def flags(output: pathlib.Path, strategy: str) -> list[str]:
    return [
      *(f"--workdir={workdir}", f"--input={faces}", f"--output={output}"),
      *(f"--strategy={strategy}", "--batch_size=2"),
    ]

  expected, found = tmp_path / "one.npz", tmp_path / "all.npz"
  stale = found.with_name(f"{found.name}.part-1-of-2.npz")
  stale.write_bytes(b"of a job that was killed")
  alone = processes.run("facedist.embed", *flags(expected, "one"))
  assert alone.returncode == 5, alone.stderr
  addresses = free_addresses(2)
  workers = []
  for index in range(2):
    task = {"cluster": {"worker": addresses}}
    task["task"] = {"type": "worker", "index": index}
    workers.append(
      processes.start(
        "facedist.embed",
        *flags(found, "multiworker"),
        log=tmp_path / f"{index}.log",
        environment={"TF_CONFIG": json.dumps(task)},
      )
    )
  codes = [worker.wait(200) for worker in workers]
  assert codes == [5, 5], (tmp_path / "0.log").read_text()
  assert [path.name for path in tmp_path.glob("*.part-*")] == []
  with np.load(found) as arrays, np.load(expected) as wanted:
    assert arrays["skipped_places"].tolist() == [2, 7]
    for name in set(wanted.files) - {"embeddings"}:
      np.testing.assert_array_equal(arrays[name], wanted[name])
    np.testing.assert_allclose(arrays["embeddings"], wanted["embeddings"], atol=1e-5)


@pytest.mark.parametrize(
  ("records", "fetched"),
  [(range(0), ()), (range(3, 12), [0]), (range(24, 48), [1]), (range(20, 90), [0, 1])],
)
def test_a_part_of_a_set_is_its_records_and_fetches_no_other_shard(
  bucket, tmp_path, records, fetched
):
  for path in (RECORDED / "shards").iterdir():
    storage.upload(str(path), f"{bucket}/set/{path.name}")

  def names(folder: str, **part: range) -> list[str]:
    opened = staged_dataset.open_set(
      folder, str(tmp_path / "cache"), cache_gb=0.0, accept_corrupt=True, keep=False
    )
    with opened as data:
      loaders = image_source.loaders(data, "train", image_size=28, **part)
      return [loader().path for loader in loaders]

  every = names(str(RECORDED / "shards"))
  assert names(f"{bucket}/set", records=records) == every[records.start : records.stop]
  for shard in (0, 1):
    read = bucket.traffic.bytes_read(f"{bucket}/set/train-0000{shard}-*.tfrecord")
    assert (read > 0) == (shard in fetched)
