import pytest

from facedist import errors
from facedist.data import image_names
from tfrecords_tools import lists, source


def paths_of(groups):
  return [path for group in groups for path in group.paths]


def of_paths(path, input_dir, *, origins):
  names = image_names.NameFilter()
  return lists.of_paths(str(path), input_dir, names=names, origins=origins)


def test_a_list_says_which_images_to_take(vggface2_dir):
  path = vggface2_dir.parent / "some.txt"
  path.write_text("n000003/0002_01.jpg\nn000001/0003_01.jpg\n")
  groups = lists.of_images(str(vggface2_dir), str(path), names=image_names.NameFilter())
  assert paths_of(groups) == ["n000001/0003_01.jpg", "n000003/0002_01.jpg"]


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("n000001/0001_01.jpg\n" * 2, "twice"),
    ("0001_01.jpg\n", "is not identity/image"),
    ("../train/0001_01.jpg\n", "is not identity/image"),
    ("n000042/0001_01.jpg\n", "lists images of n000042, which is not in"),
    ("\n", "lists no image"),
  ],
)
def test_a_list_that_does_not_fit_is_an_error(vggface2_dir, text, reason):
  path = vggface2_dir.parent / "some.txt"
  path.write_text(text)
  with pytest.raises(errors.DataError, match=reason):
    list(lists.of_images(str(vggface2_dir), str(path), names=image_names.NameFilter()))


def test_a_path_list_may_name_images_anywhere(tmp_path):
  path = tmp_path / "images.txt"
  path.write_text(
    "# by hand\nb/2.jpg\n/data/x/a/1.jpg\ngs://faces/deep/down/c/3.jpg\n"
    "more/b/1.jpg\n/data/x/a/0.jpg\n\n/d/4.jpg\n"
  )
  origins: list[str] = []
  groups = list(of_paths(path, "/faces", origins=origins))
  found = {
    path: origins[row["origin"]]
    for group in groups
    for path, row in zip(group.paths, group.rows, strict=True)
  }
  assert found == {
    "a/0.jpg": "/data/x",
    "a/1.jpg": "/data/x",
    "b/1.jpg": "/faces/more",
    "b/2.jpg": "/faces",
    "c/3.jpg": "gs://faces/deep/down",
    "d/4.jpg": "/",
  }
  assert list(found) == sorted(found)
  assert all((group.rows["length"] == source.WHOLE).all() for group in groups)


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("a/1.jpg\n/other/a/1.jpg\n", "a/1.jpg comes twice, in /faces and in /other"),
    ("/1.jpg\n", "does not end in identity/image"),
    ("a/\n", "does not end in identity/image"),
    ("a/../b/1.jpg\n", "does not end in identity/image"),
    ("gs://faces/1.jpg\n", "does not end in identity/image"),
    ("# none\n", "lists no image"),
  ],
)
def test_a_path_list_that_does_not_fit_is_an_error(tmp_path, text, reason):
  path = tmp_path / "images.txt"
  path.write_text(text)
  with pytest.raises(errors.DataError, match=reason):
    list(of_paths(path, "/faces", origins=[]))


def test_a_relative_path_needs_a_folder(tmp_path):
  path = tmp_path / "images.txt"
  path.write_text("a/1.jpg\n")
  with pytest.raises(errors.DataError, match="say from which --input_dir"):
    list(of_paths(path, None, origins=[]))


def test_listed_thumbnails_and_other_files_are_left_out_and_counted(tmp_path):
  path = tmp_path / "images.txt"
  lines = ("n1/1.JFIF", "n1/@eaDir/1.jpg/thumb.jpg", "n1/@eaDir/2.jpg/thumb.jpg")
  lines += ("/faces/n1/2.jpg", "/faces/.Trash-0/files/n1/3.jpg", "n1/Thumbs.db")
  lines += ("/faces/n2/4.gif", "./n2/5.webp")
  path.write_text("\n".join(lines))
  names = image_names.NameFilter()
  groups = lists.of_paths(str(path), "/faces", names=names, origins=[])
  assert paths_of(groups) == ["n1/1.JFIF", "n1/2.jpg", "n2/5.webp"]
  assert names.left_out == {image_names.HIDDEN: 3, "files ending in .gif": 1}


def test_a_hidden_folder_above_the_input_may_hold_it(tmp_path):
  path = tmp_path / "images.txt"
  path.write_text("/home/me/.cache/faces/n1/1.jpg\n")
  groups = of_paths(path, "/home/me/.cache/faces/", origins=[])
  assert paths_of(groups) == ["n1/1.jpg"]
  with pytest.raises(errors.DataError, match=r"no image \(left out: hidden .*: 1\)"):
    list(of_paths(path, None, origins=[]))
