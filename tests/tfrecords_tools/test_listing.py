import pytest

from facedist import errors
from tfrecords_tools import listing


def paths_of(groups):
  return [path for group in groups for path in group.paths]


def test_identities_come_in_the_order_of_their_paths(tmp_path):
  for path in ("b/2.jpg", "b/10.PNG", "a/1.jpg", "a-c/1.jpeg"):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).touch()
  paths = paths_of(listing.in_folder(str(tmp_path)))
  assert paths == ["a-c/1.jpeg", "a/1.jpg", "b/10.PNG", "b/2.jpg"] == sorted(paths)


def test_a_list_says_which_images_to_take(vggface2_dir):
  path = vggface2_dir.parent / "some.txt"
  path.write_text("n000003/0002_01.jpg\nn000001/0003_01.jpg\n")
  groups = listing.in_image_list(str(vggface2_dir), str(path))
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
    list(listing.in_image_list(str(vggface2_dir), str(path)))


def test_a_folder_without_folders_of_images_is_an_error(tmp_path):
  with pytest.raises(errors.DataError, match="has no images in folders"):
    list(listing.in_folder(str(tmp_path)))
  with pytest.raises(errors.DataError, match="is no folder"):
    list(listing.in_folder(str(tmp_path / "no")))
