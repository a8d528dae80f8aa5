import cv2
import numpy as np
import pytest
from sklearn import model_selection

from facedist import errors
from facedist.data import verification_set
from facedist.data.readers import local_reader
from facedist.data.shards import manifest
from tests.tfrecords_tools.conftest import jpeg_of, landmark_row
from tfrecords_tools import build, inspect, verify
from tfrecords_tools.sources import pair_list

FOLDERS = (
  "a/1.jpg,a/2.jpg,1\na/1.jpg,b/1.jpg,0\nb/2.png,b/1.jpg,same\nb/2.png,a/2.jpg,0\n"
)


@pytest.fixture
def written(tmp_path):
  """Writes a list and its images, whose grey is their place among the sorted names."""

  def write(text, images=("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.png")):
    for number, name in enumerate(sorted(images)):
      path = tmp_path / "faces" / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(jpeg_of(np.full((112, 112, 3), 20 * number, np.uint8)))
    (tmp_path / "pairs.csv").write_text(text)
    return str(tmp_path / "faces"), str(tmp_path / "pairs.csv")

  return write


def grey_pairs(folder):
  """Returns each pair as the numbers of its images by their grey, same and fold."""
  found = verification_set.load_verification_set(folder)
  reader = local_reader.open_reader(folder, "images")
  jpegs, _ = reader.read(np.arange(found.num_images))
  images = [cv2.imdecode(np.frombuffer(bytes(jpeg), np.uint8), 0) for jpeg in jpegs]
  numbers = np.array([round(image.mean() / 20) for image in images])
  columns = (numbers[found.first], numbers[found.second], found.same, found.folds)
  return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize(
  ("text", "folds"),
  [
    (FOLDERS, [0, 1, 2, 3]),
    (
      "id,Same,image2,image1,fold\n1,1,a/2.jpg,a/1.jpg,5\n2,0,b/1.jpg,./a//1.jpg,5\n"
      "3,TRUE,b/1.jpg,b/2.png,6\n4,different,a/2.jpg,b/2.png,6\n",
      [0, 0, 1, 1],
    ),
    (
      "".join(f"{line},{n // 2 + 5}\n" for n, line in enumerate(FOLDERS.split())),
      [0, 0, 1, 1],
    ),
  ],
)
def test_a_csv_becomes_a_verification_set(written, build_config, tmp_path, text, folds):
  folder, pairs = written(text)
  config = build_config(folder, dataset="pairs", pairs=pairs, num_shards=1)
  assert build.main(config) == errors.ExitCode.DONE
  expected = [(0, 1, True), (0, 2, False), (3, 2, True), (3, 1, False)]
  assert grey_pairs(config.output_dir) == [
    (*pair, fold) for pair, fold in zip(expected, folds, strict=True)
  ]
  verify.main(verify.VerifyConfig(data_dir=config.output_dir))
  inspect.main(
    inspect.InspectConfig(data_dir=config.output_dir, report=str(tmp_path / "report"))
  )
  assert '"identity": "a"' in (tmp_path / "report").read_text()


def test_images_that_lie_in_one_folder_or_deep_are_joined_by_their_pairs(
  written, build_config
):
  names = ("1.jpg", "2.jpg", "3.jpg", "x/y/4.jpg")
  text = "1.jpg,2.jpg,1\n3.jpg,2.jpg,1\n3.jpg,x/y/4.jpg,0\n"
  folder, pairs = written(text, names)
  config = build_config(folder, dataset="pairs", pairs=pairs, num_shards=1)
  build.main(config)
  expected = [(0, 1, True, 0), (2, 1, True, 1), (2, 3, False, 2)]
  assert grey_pairs(config.output_dir) == expected
  verify.main(verify.VerifyConfig(data_dir=config.output_dir))
  found = pair_list.read_set(folder, pairs=pairs)
  assert [(group.identity, group.paths) for group in found.groups] == [
    ("0000000", ["0000000/1.jpg", "0000000/2.jpg", "0000000/3.jpg"]),
    ("0000001", ["0000001/x/y/4.jpg"]),
  ]


def test_deeper_folders_are_identities_where_they_agree_with_the_pairs(written):
  names = ("r/a/1.jpg", "r/a/2.jpg", "r/b/1.jpg")
  folder, pairs = written("r/a/1.jpg,r/a/2.jpg,1\nr/a/1.jpg,r/b/1.jpg,0\n", names)
  found = pair_list.read_set(folder, pairs=pairs)
  assert [group.identity for group in found.groups] == ["r_a", "r_b"]


def test_folds_are_scikit_learns_without_a_column(tmp_path):
  path = tmp_path / "pairs.csv"
  path.write_text("".join(f"a/{n}.jpg,b/{n}.jpg,0\n" for n in range(23)))
  folds = [pair.fold for pair in pair_list.read(str(path))]
  for fold, (_, test) in enumerate(
    model_selection.KFold(10, shuffle=False).split(np.zeros(23))
  ):
    assert [place for place in range(23) if folds[place] == fold] == test.tolist()


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("a/1.jpg,a/9.jpg,1\n", r"line 1: .*faces/a/9.jpg does not exist"),
    ("a/1.jpg,a/2.jpg,1\n\na/2.jpg,a/1.jpg,0\n", "line 3: .* are in line 1 already"),
    ("a/1.jpg,a/2.jpg,1\na/1.jpg,./a/2.jpg,1\n", "line 2: .* are in line 1 already"),
    ("a/1.jpg,a/1.jpg,1\n", "line 1: .* with itself"),
    ("a/1.jpg,a/2.jpg,yes\n", "line 1: .*'yes' must be 1, true or same"),
    ("a/1.jpg,a/2.jpg\n", "line 1: .* is not image1,image2,same"),
    ("a/1.jpg,a/2.jpg,1,x\n", "line 1: .*the fold 'x' must be"),
    ("a/1.jpg,a/2.jpg,1,1\na/1.jpg,b/1.jpg,0\n", "line 2: .* is not image1,image2"),
    ("a/1.jpg,../a/2.jpg,1\n", "line 1: .*must be the path of an image below"),
    ("image1,image2,label\na/1.jpg,a/2.jpg,1\n", "names no column same"),
    ("image1,image2,same\n", "lists no pair"),
    ("", "lists no pair"),
    (
      "a/1.jpg,a/2.jpg,0\na/1.jpg,b/1.jpg,1\nb/1.jpg,a/2.jpg,1\n",
      "line 1: a/1.jpg and a/2.jpg are two people here, but other lines make them one",
    ),
  ],
)
def test_a_line_that_is_wrong_is_named(written, text, words):
  folder, pairs = written(text)
  with pytest.raises(errors.DataError, match=f"pairs.csv.*{words}"):
    pair_list.read_set(folder, pairs=pairs)


def test_folders_whose_names_would_be_one_identity_are_refused(written):
  names = ("a_b/1.jpg", "a/b/1.jpg", "a/b/2.jpg")
  folder, pairs = written("a/b/1.jpg,a/b/2.jpg,1\na/b/1.jpg,a_b/1.jpg,0\n", names)
  with pytest.raises(errors.DataError, match="line 2: the folders a/b and a_b would"):
    pair_list.read_set(folder, pairs=pairs)


def test_a_broken_image_is_named_with_its_line(written, build_config, tmp_path):
  folder, pairs = written(FOLDERS)
  (tmp_path / "faces" / "b" / "1.jpg").write_bytes(b"cut off")
  config = build_config(folder, dataset="pairs", pairs=pairs, num_shards=1)
  with pytest.raises(errors.DataError, match=r"pairs\.csv, line 2: .*faces/b/1\.jpg: "):
    build.main(config)


def test_landmarks_align_the_images(written, build_config, tmp_path):
  folder, pairs = written("a/1.jpg,a/2.jpg,1\n", ("a/1.jpg", "a/2.jpg"))
  table = tmp_path / "points.csv"
  table.write_text("\n".join(landmark_row(f"a/{n}") for n in (1, 2)))
  changes = {"pairs": pairs, "num_shards": 1, "landmarks": str(table)}
  config = build_config(folder, dataset="pairs", **changes)
  build.main(config)
  made = manifest.load(config.output_dir)
  assert made.alignment == {"template": "arcface", "images": {"landmarks": 2}}
