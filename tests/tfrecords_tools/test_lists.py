import pytest

from facedist import errors
from tfrecords_tools import lists, source


def paths_of(groups):
  return [path for group in groups for path in group.paths]


def test_a_list_says_which_images_to_take(vggface2_dir):
  path = vggface2_dir.parent / "some.txt"
  path.write_text("n000003/0002_01.jpg\nn000001/0003_01.jpg\n")
  groups = lists.of_images(str(vggface2_dir), str(path))
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
    list(lists.of_images(str(vggface2_dir), str(path)))


def test_a_path_list_may_name_images_anywhere(tmp_path):
  path = tmp_path / "images.txt"
  path.write_text(
    "# by hand\nb/2.jpg\n/data/x/a/1.jpg\ngs://faces/deep/down/c/3.jpg\n"
    "more/b/1.jpg\n/data/x/a/0.jpg\n\n/d/4.jpg\n"
  )
  origins: list[str] = []
  groups = list(lists.of_paths(str(path), "/faces", origins=origins))
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
    list(lists.of_paths(str(path), "/faces", origins=[]))


def test_a_relative_path_needs_a_folder(tmp_path):
  path = tmp_path / "images.txt"
  path.write_text("a/1.jpg\n")
  with pytest.raises(errors.DataError, match="say from which --input_dir"):
    list(lists.of_paths(str(path), None, origins=[]))
