import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import tarfile

import cv2
import numpy as np
import pytest
from PIL import Image

from facedist import errors, storage
from facedist.data import image_source
from facedist.data.cache import staged_dataset
from facedist.data.shards import manifest
from tests.tfrecords_tools import folders, test_build
from tfrecords_tools import build, verify


@pytest.fixture
def whole(vggface2_dir, build_config, tmp_path):
  """The files of a build from a folder."""
  config = build_config(
    vggface2_dir, output_dir=str(tmp_path / "whole"), val_fraction=0.3
  )
  build.main(config)
  return folders.files_of(config.output_dir)


@pytest.fixture
def tar(vggface2_dir):
  """train.tar, with the tables beside it and the folder gone."""
  path = vggface2_dir.parent / "train.tar"
  with tarfile.open(path, "w") as archive:
    archive.add(vggface2_dir, "train")
  shutil.rmtree(vggface2_dir)
  return path


@pytest.fixture
def in_bucket(vggface2_dir, bucket):
  """The folder and its tables in a bucket."""
  for path in vggface2_dir.parent.rglob("*"):
    if path.is_file():
      name = path.relative_to(vggface2_dir.parent)
      storage.upload(str(path), f"{bucket}/faces/{name}")
  return f"{bucket}/faces/train"


def built(build_config, input_dir, **changes):
  config = build_config(input_dir, val_fraction=0.3, **changes)
  build.main(config)
  return folders.files_of(config.output_dir)


def test_a_tar_gives_the_folders_bytes(whole, tar, build_config):
  assert built(build_config, tar) == whole
  assert list(tar.parent.glob("train/*")) == []


def test_a_bucket_gives_the_folders_bytes(whole, in_bucket, build_config):
  assert built(build_config, in_bucket) == whole


def test_the_top_of_a_bucket_gives_the_folders_bytes(
  whole, vggface2_dir, bucket, build_config
):
  for path in vggface2_dir.parent.rglob("*"):
    if path.is_file():
      is_image = vggface2_dir in path.parents
      below = path.relative_to(vggface2_dir if is_image else vggface2_dir.parent)
      name = str(below).replace("_train.csv", f"_{bucket.removeprefix('gs://')}.csv")
      storage.upload(str(path), f"{bucket}/{name}")
  found = built(build_config, bucket)
  assert found.pop("manifest.json") != b""  # which counts the tables as left out
  assert found == {name: whole[name] for name in whole if name != "manifest.json"}


def test_a_tar_in_a_bucket_gives_the_folders_bytes(whole, tar, bucket, build_config):
  for path in tar.parent.glob("*.*"):
    storage.upload(str(path), f"{bucket}/faces/{path.name}")
  assert built(build_config, f"{bucket}/faces/train.tar") == whole


@pytest.mark.parametrize("is_relative", [True, False])
def test_a_path_list_gives_the_folders_bytes(
  whole, vggface2_dir, build_config, tmp_path, is_relative
):
  start = vggface2_dir if is_relative else pathlib.Path("/")
  prefix = "" if is_relative else "/"
  paths = [prefix + str(path.relative_to(start)) for path in vggface2_dir.glob("*/*")]
  listed = tmp_path / "images.txt"
  listed.write_text("\n".join(paths))
  parent = vggface2_dir.parent
  tables = {
    "landmarks": str(parent / "loose_landmark_train.csv"),
    "identity_meta": str(parent / "identity_meta.csv"),
  }
  input_dir = str(vggface2_dir) if is_relative else None
  assert built(build_config, input_dir, input_list=str(listed), **tables) == whole


def test_a_lists_labels_are_the_identities_of_a_build(
  vggface2_dir, build_config, tmp_path
):
  tables = {"landmarks": "none", "bounding_boxes": "none"}
  of_folders = str(tmp_path / "of_folders")
  build.main(build_config(vggface2_dir, output_dir=of_folders, **tables))
  known = {
    record.filename: record.jpeg for record in test_build.read_all(of_folders, "train")
  }
  listed = tmp_path / "train.lst"
  listed.write_text(
    "".join(
      f"{number}\t{11 + number % 2}.000000\t{path}\n"
      for number, path in enumerate(sorted(known))
    )
  )
  config = build_config(
    vggface2_dir, input_list=str(listed), list_labels=True, **tables
  )
  assert build.main(config) == errors.ExitCode.DONE
  assert list(verify.verify(config.output_dir, verify.Totals())) == []
  assert manifest.load(config.output_dir).identities == ("11", "12")
  found = {
    record.filename: (record.identity, record.label, record.jpeg)
    for record in test_build.read_all(config.output_dir, "train")
  }
  assert found == {
    f"{11 + number % 2}/{path}": (f"{11 + number % 2}", number % 2, known[path])
    for number, path in enumerate(sorted(known))
  }


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({}, "--list_labels needs the list itself; say --input_list"),
    ({"input_list": "a"}, "does not go with --landmarks=.*loose_landmark_train.csv"),
    (
      {"input_list": "a", "landmarks": "none", "bounding_boxes": __file__},
      "does not go with --bounding_boxes=",
    ),
    ({"dataset": "lfw", "input_list": "a"}, "--list_labels=True would break the pairs"),
  ],
)
def test_labels_go_with_a_list_and_with_no_table(
  vggface2_dir, build_config, changes, reason
):
  with pytest.raises(errors.UsageError, match=reason):
    build.main(build_config(vggface2_dir, list_labels=True, **changes))


ENDINGS = [".jpg", ".JPE", ".jfif", ".PNG", ".bmp", ".webp", ".tif", ".TIFF", ".jp2"]


@pytest.fixture
def of_all_kinds(vggface2_dir):
  """An image of every kind, turned where its kind can say so, and some of no use."""
  folder = vggface2_dir.parent / "kinds"
  (folder / "n1").mkdir(parents=True)
  exif = Image.Exif()
  exif[0x0112] = 6
  with Image.open(vggface2_dir / "n000001" / "0001_01.jpg") as image:
    for ending in ENDINGS:
      kind = {".jpe": "JPEG", ".jfif": "JPEG"}.get(ending.lower())
      kind = kind or Image.registered_extensions()[ending.lower()]
      options = {} if kind in ("BMP", "JPEG2000") else {"exif": exif}
      image.save(folder / "n1" / f"{ending[1:]}{ending}", kind, **options)
    image.save(folder / "n1" / "1.gif")
  (folder / "n1" / ".ipynb_checkpoints").mkdir()
  shutil.copy(folder / "n1" / "bmp.bmp", folder / "n1" / ".ipynb_checkpoints")
  return folder


@pytest.mark.parametrize("kind", ["folder", "bucket", "tar", "list"])
def test_every_kind_of_image_becomes_a_valid_record_from_every_source(
  of_all_kinds, bucket, build_config, kind
):
  parent, changes = of_all_kinds.parent, {}
  source = of_all_kinds
  files = [path for path in of_all_kinds.rglob("*") if path.is_file()]
  if kind == "bucket":
    source = f"{bucket}/kinds"
    for path in files:
      storage.upload(str(path), f"{source}/{path.relative_to(of_all_kinds)}")
  elif kind == "tar":
    source = parent / "kinds.tar"
    with tarfile.open(source, "w") as archive:
      archive.add(of_all_kinds, "kinds")
  elif kind == "list":
    changes["input_list"] = str(parent / "list.txt")
    (parent / "list.txt").write_text("\n".join(map(str, files)))
  config = build_config(source, num_shards=1, image_size=48, **changes)
  build.main(config)
  made = manifest.load(config.output_dir)
  assert made.splits["train"].records == len(ENDINGS)
  assert made.skipped == ()
  assert made.source["left_out"] == {
    "files ending in .gif": 1,
    "hidden or system files and folders": 1,
  }
  assert list(verify.verify(config.output_dir, verify.Totals())) == []
  with staged_dataset.open_set(config.output_dir, "unused") as data:
    faces = [one() for one in image_source.loaders(data, "train", image_size=48)]
  for face in faces:
    file = image_source.decode((of_all_kinds / face.path).read_bytes(), image_size=48)
    small = [cv2.resize(image, (4, 4)).astype(int) for image in (face.image, file)]
    np.testing.assert_allclose(*small, atol=12)


def test_a_bucket_that_fails_now_and_then_gives_the_same_bytes(
  whole, in_bucket, bucket, build_config
):
  bucket.faults.rate(0.1, seed=1)
  assert built(build_config, in_bucket) == whole
  assert sum(bucket.traffic.faults().values()) > 0


def test_an_image_that_is_gone_from_a_bucket_is_skipped_as_from_a_disk(
  in_bucket, vggface2_dir, build_config, tmp_path
):
  storage.remove(f"{in_bucket}/n000001/0003_01.jpg")
  (vggface2_dir / "n000001" / "0003_01.jpg").unlink()
  one = built(build_config, vggface2_dir, output_dir=str(tmp_path / "one"))
  assert built(build_config, in_bucket) == one
  assert manifest.load(str(tmp_path / "one")).skipped == (
    {"path": "n000001/0003_01.jpg", "reason": "No such file or directory"},
  )


def test_a_bucket_that_refuses_the_images_ends_the_build(
  in_bucket, bucket, build_config
):
  bucket.faults.always(status=403, matching=f"{in_bucket}/n000001/0003_01.jpg")
  with pytest.raises(errors.AccessError, match=r"0003_01\.jpg: permission denied"):
    build.main(build_config(in_bucket))


@pytest.mark.slow
def test_processes_share_a_tar_and_a_bucket(whole, tar, bucket, build_config, tmp_path):
  for path in tar.parent.glob("*.*"):
    storage.upload(str(path), f"{bucket}/faces/{path.name}")
  for number, source in enumerate((tar, f"{bucket}/faces/train.tar")):
    folder = str(tmp_path / str(number))
    config = build_config(source, val_fraction=0.3, num_processes=2, output_dir=folder)
    flags = [f"--{name}={value}" for name, value in vars(config).items() if value]
    # A process of its own: the fork server of this one knows no bucket.
    subprocess.run([sys.executable, "-m", "tfrecords_tools.build", *flags], check=True)
    assert folders.files_of(folder) == whole


def test_insightfaces_sets_are_built(lfw_dir, build_config, tmp_path):
  images = [path.read_bytes() for path in sorted(lfw_dir.glob("*/*.jpg"))]
  path = tmp_path / "six.bin"
  path.write_bytes(pickle.dumps((images, [True, False, False]), protocol=2))
  config = build_config(path, dataset="bin", num_shards=None)
  build.main(config)
  made = manifest.load(config.output_dir)
  assert (made.kind, made.dataset) == ("verification", "bin")
  assert (made.pairs.pairs, made.pairs.folds) == (3, 3)
  assert made.alignment["images"] == {"source_bytes_kept": 6}
  assert list(verify.verify(config.output_dir, verify.Totals())) == []
  content = pathlib.Path(
    config.output_dir, "images-00000-of-00001.tfrecord"
  ).read_bytes()
  places = [content.index(image) for image in images]
  assert places == sorted(places)


def write_bin(path, images):
  """Writes pairs of neighbours, each of two people."""
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(pickle.dumps((images, [False] * (len(images) // 2)), protocol=2))
  return path


@pytest.fixture
def jpegs(lfw_dir):
  """Six encoded images."""
  return [path.read_bytes() for path in sorted(lfw_dir.glob("*/*.jpg"))][:6]


@pytest.mark.parametrize("content", [b"", b"broken", "cut off"])
@pytest.mark.parametrize("max_bad", [0, 100])
def test_a_broken_image_of_a_bin_set_is_named_with_its_place_and_the_fix(
  jpegs, build_config, tmp_path, content, max_bad
):
  broken = jpegs[3][:-50] if content == "cut off" else content
  path = write_bin(tmp_path / "a.bin", [*jpegs[:3], broken, *jpegs[4:]])
  config = build_config(path, dataset="bin", max_bad=max_bad)
  with pytest.raises(errors.DataError, match="download the file again") as caught:
    build.main(config)
  message = str(caught.value)
  assert message.startswith(f"{path}: image 3, of pair 1 (both count from 0): ")
  assert "max_bad" not in message
  write_bin(path, jpegs)  # what the message asks for
  shutil.rmtree(config.output_dir)
  assert build.main(config) == errors.ExitCode.DONE


def test_a_broken_image_of_lfw_is_named_without_max_bad(lfw_dir, build_config):
  path = sorted(lfw_dir.glob("*/*.jpg"))[0]
  whole = path.read_bytes()
  path.write_bytes(b"broken")
  config = build_config(lfw_dir, dataset="lfw")
  with pytest.raises(errors.DataError, match="copy the image again") as caught:
    build.main(config)
  assert f"{path.parent.name}/{path.name}: " in str(caught.value)
  assert "max_bad" not in str(caught.value)
  path.write_bytes(whole)
  assert build.main(config) == errors.ExitCode.DONE


@pytest.mark.parametrize("is_folder", [True, False])
def test_several_bin_files_are_a_set_each(jpegs, build_config, tmp_path, is_folder):
  first = write_bin(tmp_path / "sets" / "lfw.bin", jpegs)
  second = write_bin(tmp_path / "sets" / "agedb_30.BIN", jpegs[:4])
  (tmp_path / "sets" / "._lfw.bin").write_bytes(b"of a Mac")
  (tmp_path / "sets" / "train.rec").write_bytes(b"of MXNet")
  given = first.parent if is_folder else f"{first},{second}"
  output = tmp_path / "out"
  config = build_config(given, dataset="bin", output_dir=str(output))
  for _ in range(2):
    assert build.main(config) == errors.ExitCode.DONE
  assert sorted(path.name for path in output.iterdir()) == ["agedb_30", "lfw"]
  assert manifest.load(str(output / "lfw")).pairs.pairs == 3
  assert manifest.load(str(output / "agedb_30")).pairs.pairs == 2


def test_bin_files_of_a_bucket_are_a_set_each(jpegs, build_config, tmp_path, bucket):
  for name in ("a", "b"):
    path = write_bin(tmp_path / f"{name}.bin", jpegs)
    storage.upload(str(path), f"{bucket}/sets/{name}.bin")
  build.main(build_config(f"{bucket}/sets", dataset="bin", output_dir=f"{bucket}/out"))
  assert storage.list_names(f"{bucket}/out") == ["a", "b"]


def test_a_broken_set_among_several_ends_the_command_and_keeps_those_before(
  jpegs, build_config, tmp_path
):
  first = write_bin(tmp_path / "a.bin", jpegs)
  second = write_bin(tmp_path / "b.bin", [b"broken", *jpegs[1:]])
  third = write_bin(tmp_path / "c.bin", jpegs)
  output = tmp_path / "out"
  config = build_config(
    f"{first},{second},{third}", dataset="bin", output_dir=str(output)
  )
  with pytest.raises(errors.DataError, match=rf"^{second}: image 0, of pair 0"):
    build.main(config)
  assert manifest.load(str(output / "a")).pairs.pairs == 3
  before = folders.files_of(str(output / "a"))
  assert not (output / "c").exists()
  write_bin(second, jpegs)
  shutil.rmtree(output / "b")
  assert build.main(config) == errors.ExitCode.DONE
  assert folders.files_of(str(output / "a")) == before
  assert [path.name for path in sorted(output.iterdir())] == ["a", "b", "c"]


def test_bin_files_that_make_no_sets_are_refused_before_any_is_built(
  jpegs, build_config, tmp_path
):
  first = write_bin(tmp_path / "a.bin", jpegs)
  twin = write_bin(tmp_path / "other" / "a.bin", jpegs)
  (tmp_path / "empty").mkdir()
  output = tmp_path / "out"
  cases = (
    (f"{first},{twin}", errors.UsageError, "would both be built into .*out/a; rename"),
    (f"{first},{tmp_path}/b.bin", errors.DataError, "b.bin"),
    (tmp_path / "empty", errors.DataError, "has no file that ends in .bin"),
  )
  for given, error, reason in cases:
    with pytest.raises(error, match=reason):
      build.main(build_config(given, dataset="bin", output_dir=str(output)))
    assert not output.exists()


def test_a_bin_file_with_a_comma_in_its_name_is_one_set(jpegs, build_config, tmp_path):
  path = write_bin(tmp_path / "a,b.bin", jpegs)
  config = build_config(path, dataset="bin")
  build.main(config)
  assert manifest.load(config.output_dir).pairs.pairs == 3


def test_flags_that_name_no_source_are_refused(vggface2_dir, build_config):
  for input_dir, changes, reason in (
    (None, {"dataset": "bin"}, "--dataset=bin needs --input_dir"),
    (None, {}, "--input_dir or --input_list is required"),
    (vggface2_dir, {"input_list": "a", "image_list": "b"}, "exclude each other"),
  ):
    with pytest.raises(errors.UsageError, match=reason):
      build.main(build_config(input_dir, **changes))


@pytest.fixture
def old_names(vggface2_dir):
  """The folder, one identity called in GBK and one image in Latin-1."""
  folder = os.fsencode(vggface2_dir)
  for name in ("loose_landmark_train.csv", "train_list.txt", "identity_meta.csv"):
    (vggface2_dir.parent / name).unlink()
  os.rename(folder + b"/n000001", folder + b"/" + "张三".encode("gbk"))
  os.rename(folder + b"/n000003/0001_01.jpg", folder + b"/n000003/caf\xe9.jpg")
  (vggface2_dir.parent / "old.tar").write_bytes(b"")
  with tarfile.open(vggface2_dir.parent / "old.tar", "w") as archive:
    archive.add(vggface2_dir, "train")
  names = sorted(
    os.path.relpath(os.path.join(place, name), folder)
    for place, _, files in os.walk(folder)
    for name in files
  )
  (vggface2_dir.parent / "list.txt").write_bytes(b"\n".join(names))
  return vggface2_dir


@pytest.mark.parametrize("kind", ["folder", "tar", "input_list", "image_list"])
def test_names_that_are_no_utf_8_build_with_their_bytes_escaped(
  old_names, build_config, kind
):
  beside = old_names.parent
  source = beside / "old.tar" if kind == "tar" else old_names
  lists = {kind: str(beside / "list.txt")} if kind.endswith("list") else {}
  config = build_config(source, **lists)
  build.main(config)
  made = manifest.load(config.output_dir)
  assert made.identities == (r"\xd5\xc5\xc8\xfd", "n000003", "n000007")
  assert made.skipped == ()
  assert sum(shard.records for shard in made.shards) == 8
  shards = b"".join(folders.files_of(config.output_dir).values())
  assert rb"n000003/caf\xe9.jpg" in shards


def test_names_that_become_the_same_are_an_error(vggface2_dir, build_config):
  folder = os.fsencode(vggface2_dir)
  os.mkdir(folder + rb"/\xe9")
  os.mkdir(folder + b"/\xe9")
  with pytest.raises(errors.DataError, match="one of them not in UTF-8; rename one"):
    build.main(build_config(vggface2_dir, image_list="none"))
