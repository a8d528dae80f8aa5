"""Which names are images, and how the others are counted."""

import pytest

from facedist.data import image_names


@pytest.mark.parametrize("ending", image_names.ENDINGS)
def test_every_ending_is_accepted_in_any_case(ending):
  names = image_names.NameFilter()
  for name in (f"1{ending}", f"1{ending.upper()}", f"a.b{ending.title()}"):
    assert names.takes(f"n1/{name}")
  assert names.left_out == {}


@pytest.mark.parametrize(
  "folder",
  [
    *(".ipynb_checkpoints", ".Trash-0", "@eaDir", "@EADIR", "__MACOSX", "#recycle"),
    *("$RECYCLE.BIN", "lost+found", "System Volume Information", ".git"),
  ],
)
def test_system_folders_are_left_out_wherever_they_are_and_count_once(folder):
  names = image_names.NameFilter()
  for path in (f"{folder}/1.jpg", f"{folder}/2.jpg", f"{folder}/n1/1.jpg"):
    assert not names.takes(path)
  assert names.left_out == {image_names.HIDDEN: 1}
  assert not names.takes(f"n1/{folder}/1.jpg/thumbnail.jpg")
  assert not names.takes_folder(f"n2/{folder}")
  assert names.left_out == {image_names.HIDDEN: 3}


@pytest.mark.parametrize(
  "name", ["._1.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", ".nfs0001"]
)
def test_system_files_are_left_out_and_each_is_counted(name):
  names = image_names.NameFilter()
  assert not names.takes(f"n1/{name}")
  assert not names.takes_file(name)
  assert names.left_out == {image_names.HIDDEN: 2}


@pytest.mark.parametrize(
  "path", ["@user/1.jpg", "a.b/1.jpg", "n1/a.gif.jpg", "lost/1.jpg", "$1/1.png"]
)
def test_names_of_people_that_resemble_system_names_are_accepted(path):
  assert image_names.NameFilter().takes(path)


def test_other_files_are_counted_by_their_endings():
  names = image_names.NameFilter()
  for name in ("1.gif", "2.GIF", "notes.txt", "jpg", "README", "a.b c", "n1/"):
    assert not names.takes(name)
  assert names.left_out == {
    "files ending in .gif": 2,
    "files ending in .txt": 1,
    "files without an ending": 2,
    "files of other endings": 1,
  }
  shown = image_names.described(names.left_out)
  assert shown.startswith("files ending in .gif: 2, files ending in .txt: 1")


def test_many_endings_are_counted_together():
  names = image_names.NameFilter()
  for number in range(1000):
    names.takes_file(f"face.{number:04d}")
  assert len(names.left_out) <= 21
  assert sum(names.left_out.values()) == 1000
