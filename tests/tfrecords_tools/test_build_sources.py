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
from tests.tfrecords_tools.folders import files_of, problems_of, records_of, upload
from tfrecords_tools import build


@pytest.fixture
def whole(vggface2_dir, build_set):
  """The files of a build from a folder."""
  return files_of(build_set(vggface2_dir, output_dir="whole", val_fraction=0.3))


def make_tar(folder):
  """Returns FOLDER.tar, with the tables beside it, and removes the folder."""
  path = folder.with_name(f"{folder.name}.tar")
  with tarfile.open(path, "w") as archive:
    archive.add(folder, folder.name)
  shutil.rmtree(folder)
  return path


@pytest.mark.parametrize("kind", ["tar", "bucket", "failing bucket", "tar in a bucket"])
def test_every_source_gives_the_folders_bytes(
  whole, vggface2_dir, bucket, build_set, kind
):
  source = make_tar(vggface2_dir) if "tar" in kind else vggface2_dir
  if "bucket" in kind:
    source = f"{upload(vggface2_dir.parent, f'{bucket}/faces')}/{source.name}"
  if "failing" in kind:
    bucket.faults.rate(0.1, seed=1)
  assert files_of(build_set(source, val_fraction=0.3)) == whole
  assert ("failing" in kind) == (bucket.traffic.faults().total() > 0)


def test_the_top_of_a_bucket_gives_the_folders_bytes(
  whole, vggface2_dir, bucket, build_set
):
  table = vggface2_dir.parent / "loose_landmark_train.csv"
  table.rename(table.with_name(f"loose_landmark_{bucket.removeprefix('gs://')}.csv"))
  upload(vggface2_dir.parent, bucket)
  for path in vggface2_dir.glob("*/*"):
    name = path.relative_to(vggface2_dir)
    storage.upload(str(path), f"{bucket}/{name}")
    storage.remove(f"{bucket}/train/{name}")
  found = files_of(build_set(bucket, val_fraction=0.3))
  # The manifest counts the tables as left out.
  assert found | {"manifest.json": whole["manifest.json"]} == whole


@pytest.mark.parametrize("is_relative", [True, False])
def test_a_path_list_gives_the_folders_bytes(
  whole, vggface2_dir, build_set, tmp_path, is_relative
):
  paths = vggface2_dir.glob("*/*")
  names = [path.relative_to(vggface2_dir) if is_relative else path for path in paths]
  (tmp_path / "images.txt").write_text("\n".join(map(str, names)))
  folder = build_set(
    vggface2_dir if is_relative else None,
    input_list=str(tmp_path / "images.txt"),
    landmarks=str(vggface2_dir.parent / "loose_landmark_train.csv"),
    identity_meta=str(vggface2_dir.parent / "identity_meta.csv"),
    val_fraction=0.3,
  )
  assert files_of(folder) == whole


def test_a_lists_labels_are_the_identities_of_a_build(
  vggface2_dir, build_set, tmp_path
):
  tables = {"landmarks": "none", "bounding_boxes": "none"}
  of_folders = records_of(build_set(vggface2_dir, output_dir="of_folders", **tables))
  known = sorted((record.filename, record.jpeg) for record in of_folders)
  listed = tmp_path / "train.lst"
  listed.write_text(
    "".join(
      f"{number}\t{11 + number % 2}.000000\t{path}\n"
      for number, (path, _) in enumerate(known)
    )
  )
  flags = {"input_list": str(listed), "list_labels": True}
  folder = build_set(vggface2_dir, **flags, **tables)
  assert problems_of(folder) == []
  assert manifest.load(folder).identities == ("11", "12")
  found = records_of(folder)
  assert sorted(
    (one.identity, one.label, one.filename, one.jpeg) for one in found
  ) == sorted(
    (f"{11 + number % 2}", number % 2, f"{11 + number % 2}/{path}", jpeg)
    for number, (path, jpeg) in enumerate(known)
  )


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
  vggface2_dir, build_set, changes, reason
):
  with pytest.raises(errors.UsageError, match=reason):
    build_set(vggface2_dir, list_labels=True, **changes)


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
  of_all_kinds, bucket, build_set, tmp_path, kind
):
  source, changes = of_all_kinds, {}
  if kind == "bucket":
    source = upload(of_all_kinds, f"{bucket}/kinds")
  elif kind == "tar":
    source = make_tar(pathlib.Path(shutil.copytree(of_all_kinds, tmp_path / "kinds")))
  elif kind == "list":
    changes["input_list"] = str(tmp_path / "list.txt")
    paths = [path for path in of_all_kinds.rglob("*") if path.is_file()]
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
  folder = build_set(source, num_shards=1, image_size=48, **changes)
  made = manifest.load(folder)
  assert made.splits["train"].records == len(ENDINGS)
  assert made.skipped == ()
  assert made.source["left_out"] == {
    "files ending in .gif": 1,
    "hidden or system files and folders": 1,
  }
  assert problems_of(folder) == []
  with staged_dataset.open_set(folder, "unused") as data:
    faces = [one() for one in image_source.loaders(data, "train", image_size=48)]
  for face in faces:
    file = image_source.decode((of_all_kinds / face.path).read_bytes(), image_size=48)
    small = [cv2.resize(image, (4, 4)).astype(int) for image in (face.image, file)]
    np.testing.assert_allclose(*small, atol=12)


def test_an_image_that_is_gone_from_a_bucket_is_skipped_as_from_a_disk(
  vggface2_dir, bucket, build_set
):
  (vggface2_dir / "n000001" / "0003_01.jpg").unlink()
  one = build_set(vggface2_dir, output_dir="one")
  there = upload(vggface2_dir.parent, f"{bucket}/faces")
  assert files_of(build_set(f"{there}/train")) == files_of(one)
  assert manifest.load(one).skipped == (
    {"path": "n000001/0003_01.jpg", "reason": "No such file or directory"},
  )


def test_a_bucket_that_refuses_the_images_ends_the_build(
  vggface2_dir, bucket, build_set
):
  there = upload(vggface2_dir.parent, f"{bucket}/faces")
  bucket.faults.always(status=403, matching=f"{there}/train/n000001/0003_01.jpg")
  with pytest.raises(errors.AccessError, match=r"0003_01\.jpg: permission denied"):
    build_set(f"{there}/train")


@pytest.mark.slow
def test_processes_share_a_tar_in_a_bucket(whole, vggface2_dir, bucket, build_config):
  make_tar(vggface2_dir)
  source = f"{upload(vggface2_dir.parent, f'{bucket}/faces')}/train.tar"
  config = build_config(source, val_fraction=0.3, num_processes=2)
  flags = [f"--{name}={value}" for name, value in vars(config).items() if value]
  # A process of its own: the fork server of this one knows no bucket.
  subprocess.run([sys.executable, "-m", "tfrecords_tools.build", *flags], check=True)
  assert files_of(config.output_dir) == whole


@pytest.fixture
def jpegs(lfw_dir):
  """Six encoded images."""
  return [path.read_bytes() for path in sorted(lfw_dir.glob("*/*.jpg"))]


def write_bin(path, images):
  """Writes pairs of neighbours, each of two people."""
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(pickle.dumps((images, [False] * (len(images) // 2)), protocol=2))
  return path


def test_insightfaces_sets_are_built(jpegs, build_set, tmp_path):
  images = jpegs * 30  # more than a process makes at a time
  path = write_bin(tmp_path / "all.bin", images)
  folder = build_set(path, dataset="bin", num_shards=None)
  made = manifest.load(folder)
  assert (made.kind, made.dataset) == ("verification", "bin")
  assert (made.pairs.pairs, made.pairs.folds) == (90, 10)
  assert made.alignment["images"] == {"source_bytes_kept": 180}
  assert [record.jpeg for record in records_of(folder, "images")] == images
  assert problems_of(folder) == []


@pytest.mark.parametrize("content", [b"", b"broken", "cut off"])
def test_a_broken_image_of_a_bin_set_is_named_with_its_place_and_the_fix(
  jpegs, build_config, tmp_path, content
):
  broken = jpegs[3][:-50] if content == "cut off" else content
  path = write_bin(tmp_path / "a.bin", [*jpegs[:3], broken, *jpegs[4:]])
  config = build_config(path, dataset="bin", max_bad=100)
  with pytest.raises(errors.DataError, match="download the file again") as caught:
    build.main(config)
  message = str(caught.value)
  assert message.startswith(f"{path}: image 3, of pair 1 (both count from 0): ")
  assert "max_bad" not in message
  write_bin(path, jpegs)  # what the message asks for
  shutil.rmtree(config.output_dir)
  assert build.main(config) == errors.ExitCode.DONE


def test_a_broken_image_of_lfw_is_named_without_max_bad(lfw_dir, build_set):
  path = lfw_dir / "Cher" / "Cher_0001.jpg"
  whole = path.read_bytes()
  path.write_bytes(b"broken")
  with pytest.raises(errors.DataError, match="copy the image again") as caught:
    build_set(lfw_dir, dataset="lfw")
  assert "Cher/Cher_0001.jpg: it is cut off" in str(caught.value)
  assert "max_bad" not in str(caught.value)
  path.write_bytes(whole)
  assert problems_of(build_set(lfw_dir, dataset="lfw")) == []


@pytest.mark.parametrize("kind", ["folder", "list", "bucket"])
def test_several_bin_files_are_a_set_each(jpegs, build_set, tmp_path, bucket, kind):
  sets = tmp_path / "sets"
  first = write_bin(sets / "lfw.bin", jpegs)
  second = write_bin(sets / "agedb_30.BIN", jpegs[:4])
  (sets / "._lfw.bin").write_bytes(b"of a Mac")
  (sets / "train.rec").write_bytes(b"of MXNet")
  given, output = (f"{first},{second}" if kind == "list" else sets), "out"
  if kind == "bucket":
    given, output = upload(sets, f"{bucket}/sets"), f"{bucket}/out"
  for _ in range(2):
    folder = build_set(given, dataset="bin", output_dir=output)
  assert storage.list_names(folder) == ["agedb_30", "lfw"]
  assert manifest.load(f"{folder}/lfw").pairs.pairs == 3
  assert manifest.load(f"{folder}/agedb_30").pairs.pairs == 2


def test_a_broken_set_among_several_ends_the_command_and_keeps_those_before(
  jpegs, build_config, tmp_path
):
  first, second, third = (write_bin(tmp_path / f"{name}.bin", jpegs) for name in "abc")
  write_bin(second, [b"broken", *jpegs[1:]])
  config = build_config(f"{first},{second},{third}", dataset="bin")
  output = pathlib.Path(config.output_dir)
  with pytest.raises(errors.DataError, match=rf"^{second}: image 0, of pair 0"):
    build.main(config)
  before = files_of(output / "a")
  assert "manifest.json" in before
  assert not (output / "c").exists()
  write_bin(second, jpegs)
  shutil.rmtree(output / "b")
  assert build.main(config) == errors.ExitCode.DONE
  assert files_of(output / "a") == before
  assert storage.list_names(str(output)) == ["a", "b", "c"]


def test_bin_files_that_make_no_sets_are_refused_before_any_is_built(
  jpegs, build_config, tmp_path
):
  first = write_bin(tmp_path / "a.bin", jpegs)
  twin = write_bin(tmp_path / "other" / "a.bin", jpegs)
  (tmp_path / "empty").mkdir()
  for given, error, reason in (
    (f"{first},{twin}", errors.UsageError, "both be built into .*shards/a; rename"),
    (f"{first},{tmp_path}/b.bin", errors.DataError, "b.bin"),
    (tmp_path / "empty", errors.DataError, "has no file that ends in .bin"),
  ):
    config = build_config(given, dataset="bin")
    with pytest.raises(error, match=reason):
      build.main(config)
    assert not os.path.exists(config.output_dir)


def test_a_bin_file_with_a_comma_in_its_name_is_one_set(jpegs, build_set, tmp_path):
  path = write_bin(tmp_path / "a,b.bin", jpegs)
  assert manifest.load(build_set(path, dataset="bin")).pairs.pairs == 3


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"dataset": "bin"}, "--dataset=bin needs --input_dir"),
    ({}, "--input_dir or --input_list is required"),
    ({"input_list": "a", "image_list": "b"}, "exclude each other"),
  ],
)
def test_flags_that_name_no_source_are_refused(build_set, changes, reason):
  with pytest.raises(errors.UsageError, match=reason):
    build_set(None, **changes)


@pytest.fixture
def old_names(vggface2_dir):
  """The folder, one identity called in GBK and one image in Latin-1."""
  folder = os.fsencode(vggface2_dir)
  for table in vggface2_dir.parent.glob("*.*"):
    table.unlink()
  os.rename(folder + b"/n000001", folder + b"/" + "张三".encode("gbk"))
  os.rename(folder + b"/n000003/0001_01.jpg", folder + b"/n000003/caf\xe9.jpg")
  names = sorted(
    os.path.relpath(os.path.join(place, name), folder)
    for place, _, files in os.walk(folder)
    for name in files
  )
  (vggface2_dir.parent / "list.txt").write_bytes(b"\n".join(names))
  return vggface2_dir


@pytest.mark.parametrize("kind", ["folder", "tar", "input_list", "image_list"])
def test_names_that_are_no_utf_8_build_with_their_bytes_escaped(
  old_names, build_set, kind
):
  lists = {kind: str(old_names.parent / "list.txt")} if kind.endswith("list") else {}
  folder = build_set(make_tar(old_names) if kind == "tar" else old_names, **lists)
  made = manifest.load(folder)
  assert made.identities == (r"\xd5\xc5\xc8\xfd", "n000003", "n000007")
  assert made.skipped == ()
  found = records_of(folder)
  assert len(found) == 8
  assert r"n000003/caf\xe9.jpg" in {record.filename for record in found}


def test_names_that_become_the_same_are_an_error(vggface2_dir, build_set):
  folder = os.fsencode(vggface2_dir)
  os.mkdir(folder + rb"/\xe9")
  os.mkdir(folder + b"/\xe9")
  with pytest.raises(errors.DataError, match="one of them not in UTF-8; rename one"):
    build_set(vggface2_dir, image_list="none")
