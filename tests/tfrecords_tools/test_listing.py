import pathlib
import tarfile

import pytest

from facedist import errors, storage
from facedist.data import image_names
from tfrecords_tools.sources import listing


def paths_of(name, **choice):
  """Returns the paths of all images that are found there."""
  images = listing.list_images(str(name), **choice)
  return [path for group in images.groups for path in group.paths]


def test_identities_come_in_the_order_of_their_paths(tmp_path):
  for path in ("b/2.jpg", "b/10.PNG", "a/1.jpg", "a-c/1.jpeg"):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).touch()
  assert paths_of(tmp_path) == ["a-c/1.jpeg", "a/1.jpg", "b/10.PNG", "b/2.jpg"]


@pytest.fixture
def tree(vggface2_dir):
  """The folder, with what systems, notebooks and albums leave in one."""
  for path in (
    *(".ipynb_checkpoints/1.jpg", ".Trash-0/files/n9/1.jpg", "$RECYCLE.BIN/1.jpg"),
    *("@eaDir/1.jpg", "lost+found/1.jpg", "__MACOSX/n000001/._0001_01.jpg"),
    *("n000001/@eaDir/0001_01.jpg/THUMB_M.jpg", "n000003/.ipynb_checkpoints/1.jpg"),
    *("n000001/thumbs/0001_01.jpg", "n000003/thumbs/a.jpg", "n000003/thumbs/b.jpg"),
    *("n000001/._0001_01.jpg", "n000007/Thumbs.db", ".DS_Store", "cover.jpg"),
    *("n000007/1.gif", "n000007/2.GIF", "notes.txt"),
  ):
    (vggface2_dir / path).parent.mkdir(parents=True, exist_ok=True)
    (vggface2_dir / path).write_bytes(b"x")
  return vggface2_dir


@pytest.mark.parametrize("kind", ["folder", "bucket", "tar", "tar without a top"])
def test_the_same_tree_holds_the_same_images_as_a_folder_a_bucket_or_a_tar(
  tree, bucket, kind
):
  if kind == "bucket":
    for path in filter(pathlib.Path.is_file, tree.rglob("*")):
      name = f"{bucket}/faces/{path.relative_to(tree)}"
      storage.write_bytes(name, path.read_bytes())
  elif kind != "folder":
    with tarfile.open(tree.parent / "train.tar", "w") as archive:
      archive.add(tree, "train" if kind == "tar" else ".")
  place = {"folder": tree, "bucket": f"{bucket}/faces"}
  images = listing.list_images(str(place.get(kind, tree.parent / "train.tar")))
  if kind == "bucket":
    assert images.origins == [f"{bucket}/faces"]
  groups = {group.identity: len(group.paths) for group in images.groups}
  assert groups == {"n000001": 3, "n000003": 4, "n000007": 1}
  # A folder that is not looked into counts once, images that were listed each.
  deeper = images.left_out.pop(image_names.DEEPER)
  assert deeper == (2 if kind == "folder" else 3)
  assert images.left_out == {
    image_names.HIDDEN: 11,
    image_names.MISPLACED: 1,
    "files ending in .gif": 2,
    "files ending in .txt": 1,
  }


def test_archives_are_parts_of_one_tree_and_may_have_other_tops(tmp_path):
  for number, names in enumerate(
    (
      ("train/n1/1.jpg", "train/n2/1.jpg", "train/n1/small/1.jpg"),
      ("train/cover.jpg", "train/n3/1.jpg"),  # one identity and one cover
      ("all/faces/n4/1.jpg", "all/faces/n4/small/1.jpg"),
    )
  ):
    with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
      for name in names:
        archive.addfile(tarfile.TarInfo(name))
  expected = ["n1/1.jpg", "n2/1.jpg", "n3/1.jpg", "n4/1.jpg"]
  assert paths_of(f"{tmp_path}/*.tar") == expected


def tar_of(path, folder, names, top="train"):
  with tarfile.open(path, "w") as archive:
    for name in names:
      archive.add(folder / name, f"{top}/{name}")


@pytest.fixture
def tars(vggface2_dir):
  """Two archives that hold the images by turns, in no order."""
  names = paths_of(vggface2_dir)
  for part in (0, 1):
    tar_of(vggface2_dir.parent / f"part-{part}.tar", vggface2_dir, names[part::2][::-1])
  return vggface2_dir.parent


@pytest.mark.parametrize(
  "name", ["{}/part-0.tar,{}/part-1.tar", "{}/part-*.tar", "{}/part-0.tar,{}/*1.tar"]
)
def test_several_archives_are_one_source(vggface2_dir, tars, name):
  images = listing.list_images(name.format(tars, tars))
  groups = list(images.groups)
  found = [path for group in groups for path in group.paths]
  assert found == paths_of(vggface2_dir)
  for group in groups:
    for path, row in zip(group.paths, group.rows, strict=True):
      start, length = int(row["start"]), int(row["length"])
      content = storage.read_range(images.origins[row["origin"]], start, length)
      assert content == (vggface2_dir / path).read_bytes()


def test_an_archive_may_have_brackets_in_its_name(tars):
  (tars / "part-0.tar").rename(tars / "part[0]?.tar")
  assert listing.archives_of(f"{tars}/part[0]?.tar") == [f"{tars}/part[0]?.tar"]
  assert listing.archives_of(f"{tars}/part[*.tar") == [f"{tars}/part[0]?.tar"]


def test_a_list_picks_images_of_an_archive(tars):
  chosen = ["n000003/0002_01.jpg", "n000001/0003_01.jpg", "n000003/0001_01.jpg"]
  path = tars / "some.txt"
  path.write_text("\n".join(chosen))
  assert paths_of(f"{tars}/part-*.tar", chosen=str(path)) == sorted(chosen)


@pytest.mark.parametrize(
  "name", ["n000001/0009_01.jpg", "n000000/0001_01.jpg", "n000009/0001_01.jpg"]
)
def test_a_list_that_names_what_no_archive_has_is_an_error(tars, name):
  path = tars / "some.txt"
  path.write_text(f"n000003/0001_01.jpg\n{name}\n")
  with pytest.raises(errors.DataError, match=f"lists {name}, which is not in the arch"):
    paths_of(f"{tars}/part-*.tar", chosen=str(path))


def test_an_image_that_two_archives_have_is_an_error(vggface2_dir, tars):
  tar_of(tars / "part-2.tar", vggface2_dir, ["n000007/0001_01.jpg"], top="other")
  with pytest.raises(errors.DataError, match=r"n000007/0001_01.jpg comes twice, in"):
    paths_of(f"{tars}/part-*.tar")


def test_an_archive_that_is_not_there_is_named(tars):
  with pytest.raises(errors.DataError, match=r"--input_dir=.*/no.tar does not exist"):
    listing.list_images(f"{tars}/part-0.tar,{tars}/no.tar")
  with pytest.raises(errors.UsageError, match="--input_dir or --input_list is requir"):
    listing.list_images(None)


def test_a_place_without_folders_of_images_is_an_error(tmp_path, bucket):
  (tmp_path / "n1").mkdir()
  (tmp_path / "n1" / "1.gif").touch()
  for place, message in (
    (tmp_path, r"no images in folders \(left out: files ending in .gif: 1"),
    (tmp_path / "no", "no is no folder|no does not exist"),
    (f"{bucket}/none", "gs://faces/none has no images"),
  ):
    with pytest.raises(errors.DataError, match=message):
      paths_of(place)
