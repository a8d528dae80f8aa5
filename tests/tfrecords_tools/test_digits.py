import dataclasses
import io

import cv2
import numpy as np
import pytest

from facedist import errors, storage
from facedist.data.readers import local_reader
from tfrecords_tools import build
from tfrecords_tools.sources import mnist


def arrays_of(**changes: np.ndarray) -> dict[str, np.ndarray]:
  """Six train and three test images; each has one grey, 20 more than the one before."""
  greys = (20 + 20 * np.arange(9, dtype=np.uint8))[:, None, None]
  images = np.broadcast_to(greys, (9, 12, 12))
  labels = np.array([10, 0, 7, 7, 0, 10, 7, 10, 0], np.uint8)
  parts = (images[:6], labels[:6], images[6:], labels[6:])
  return dict(zip(mnist.KEYS, parts, strict=True)) | changes


@pytest.fixture
def saved(tmp_path):
  """Writes an .npz file of these arrays, as numpy.savez does; returns its path."""

  def save(**changes):
    path = tmp_path / "mnist.npz"
    np.savez_compressed(path, **arrays_of(**changes))
    return str(path)

  return save


@pytest.fixture
def npz_config(build_config, saved):
  """Makes the settings of a build from an .npz file."""

  def make(**changes):
    return build_config(saved(), **({"dataset": "npz", "image_size": 12} | changes))

  return make


def contents_of(folder: str, split: str) -> dict[int, str]:
  """Returns each image's class by its grey, rounded to tens."""
  opened = local_reader.open_reader(folder, split)
  jpegs, labels = opened.read(np.arange(opened.num_records))
  found = {}
  for jpeg, label in zip(jpegs, labels, strict=True):
    pixels = cv2.imdecode(np.frombuffer(bytes(jpeg), np.uint8), cv2.IMREAD_COLOR)
    assert pixels.shape == (12, 12, 3)
    found[round(pixels.mean(), -1)] = opened.manifest.identities[label]
  return found


def test_an_npz_becomes_shards_whose_val_are_its_test_images(npz_config):
  config = npz_config()
  build.main(config)
  train = {20: "10", 40: "00", 60: "07", 80: "07", 100: "00", 120: "10"}
  assert contents_of(config.output_dir, "train") == train
  assert contents_of(config.output_dir, "val") == {140: "07", 160: "10", 180: "00"}


def test_an_npz_may_lie_in_a_bucket(npz_config, bucket):
  config = npz_config()
  storage.upload(config.input_dir, f"{bucket}/mnist.npz")
  build.main(dataclasses.replace(config, input_dir=f"{bucket}/mnist.npz"))
  assert len(contents_of(config.output_dir, "val")) == 3


def test_tasks_with_other_pixels_do_not_mix(npz_config, saved):
  build.main(npz_config(num_tasks=2, task_index=0))
  config = npz_config(num_tasks=2, task_index=1)
  saved(x_train=arrays_of()["x_train"] // 2)
  with pytest.raises(errors.ConfigError, match="contents_crc32c"):
    build.main(config)


def test_scikit_learns_digits_are_brought_to_all_greys():
  from sklearn import datasets

  found = mnist.read_bundled()
  groups = list(found.groups)
  assert [group.identity for group in groups] == list("0123456789")
  # the number of images of each digit, in scikit-learn's description of the set
  counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
  assert [len(group.paths) for group in groups] == counts
  number = int(groups[7].rows["start"][5])
  image = cv2.imdecode(np.frombuffer(found.contents[number], np.uint8), -1)
  ink, labels = datasets.load_digits(return_X_y=True)
  assert labels[number] == 7
  np.testing.assert_allclose(image.ravel(), ink[number] * 255 / 16, atol=0.5)
  assert found.is_held_out is None


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"x_test": np.zeros((3, 12, 12), np.float32)}, r"x_test is float32\[3, 12, 12\]"),
    ({"x_train": np.zeros((6, 784), np.uint8)}, r"x_train is uint8\[6, 784\]"),
    ({"x_train": np.zeros((0, 12, 12), np.uint8)}, r"x_train is uint8\[0, 12, 12\]"),
    ({"y_train": np.eye(6)}, r"y_train is float64\[6, 6\]; it must be int\[6\]"),
    (
      {"y_test": arrays_of()["y_test"][:2]},
      r"y_test is uint8\[2\]; it must be int\[3\]",
    ),
    ({"y_train": np.arange(-1, 5)}, "y_train has the class -1"),
    ({"y_test": np.array([0, 7, 8])}, "y_test has the class 8, which y_train has not"),
    ({"x_test": np.array([{}, {}, {}])}, "is no .npz file of arrays .*pickle"),
  ],
)
def test_arrays_of_another_kind_are_refused_by_what_they_are(changes, said, saved):
  with pytest.raises(errors.DataError, match=said):
    mnist.read_npz(saved(**changes))


def written_by(save, *values, **arrays):
  """Returns what one of NumPy's functions saves."""
  stream = io.BytesIO()
  save(stream, *values, **arrays)
  return stream.getvalue()


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (b"no", r"x\.npz is no \.npz file of arrays"),
    (written_by(np.savez, **arrays_of())[:-40], r"x\.npz is no \.npz file of arrays"),
    (written_by(np.save, np.zeros(3)), r"x\.npz is no \.npz file of arrays"),
    (
      written_by(np.savez, y_test=0, x_test=0),
      "has no x_train, only x_test, y_test; s",
    ),
  ],
)
def test_a_file_that_is_no_npz_of_digits_is_refused(content, said, tmp_path):
  (tmp_path / "x.npz").write_bytes(content)
  with pytest.raises(errors.DataError, match=said):
    mnist.read_npz(str(tmp_path / "x.npz"))


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"val_fraction": 0.1}, r"--val_fraction=0\.1 .* whose x_test is val"),
    ({"identities": "some.txt"}, "--identities=some.txt is not for --dataset=npz"),
    ({"input_dir": None}, "needs --input_dir=FILE.npz"),
    ({"dataset": "digits"}, r"--input_dir=.* is not for --dataset=digits"),
  ],
)
def test_flags_that_do_not_go_with_digits_are_refused(npz_config, changes, said):
  with pytest.raises(errors.UsageError, match=said):
    build.main(dataclasses.replace(npz_config(), **changes))
