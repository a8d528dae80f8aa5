import shutil
import tarfile

import numpy as np
import pytest

from facedist import errors
from tests.tfrecords_tools import folders
from tfrecords_tools import build
from tfrecords_tools.sources import lfw, listing


def read(folder, pairs=None):
  """Returns the source and the images' paths; pairs may be a list's text."""
  listed = folder.parent / "pairs.txt"
  if pairs is not None:
    listed.write_text(pairs)
  source = lfw.read(
    listing.list_images(str(folder)),
    pairs=str(listed),
    landmarks=None,
    bounding_boxes=None,
    missing_row="fail",
  )
  return source, [path for group in source.groups for path in group.paths]


def test_the_pairs_name_rows_of_the_sorted_images(lfw_dir):
  source, paths = read(lfw_dir)
  assert paths == [
    *("Al_Gore/Al_Gore_0001.jpg", "Al_Gore/Al_Gore_0002.jpg"),
    *("Bo_Derek/Bo_Derek_0001.jpg", "Bo_Derek/Bo_Derek_0002.jpg"),
    *("Cher/Cher_0001.jpg", "Dido/Dido_0001.jpg"),
  ]
  expected = [[2, 3, 1, 0], [4, 5, 0, 0], [0, 1, 1, 1], [1, 2, 0, 1]]
  np.testing.assert_array_equal(source.pairs, expected)
  assert source.num_folds == 2


@pytest.mark.parametrize(
  "ending", [".bmp", ".webp", ".tif", ".jfif", ".JPG", ".JPEG", ".Png"]
)
def test_images_of_every_kind_are_found(lfw_dir, ending):
  for path in lfw_dir.glob("*/*.jpg"):
    path.rename(path.with_suffix(ending))
  _, paths = read(lfw_dir)
  assert len(paths) == 6
  assert all(path.endswith(ending) for path in paths)


def test_images_that_no_pair_needs_are_left_out(lfw_dir):
  source, paths = read(lfw_dir, "1\nAl_Gore\t1\t2\nAl_Gore\t2\tCher\t1\n")
  assert [path[:4] for path in paths] == ["Al_G", "Al_G", "Cher"]
  assert source.num_folds == 1


def test_of_two_files_of_one_name_the_jpeg_is_taken(lfw_dir):
  (lfw_dir / "Cher" / "Cher_0001.png").touch()
  images, paths = read(lfw_dir)
  assert [path for path in paths if "Cher" in path] == ["Cher/Cher_0001.jpg"]
  assert images.pairs.tolist()[1] == [4, 5, 0, 0]


@pytest.mark.parametrize(
  ("same", "different"),
  [
    ("Al_Gore Al_Gore_0001.jpg Al_Gore_0002.jpg", "Al_Gore Al_Gore_0002.jpg Cher 1"),
    ("Al_Gore\tAl_Gore_0001\t2", "Al_Gore Al_Gore_0002.JPG Cher Cher_0001.png"),
    (
      "Al_Gore Al_Gore/Al_Gore_0001.jpg Al_Gore/Al_Gore_0002.jpg",
      "Al_Gore Al_Gore/Al_Gore_0002.jpg Cher Cher/Cher_0001.jpg",
    ),
  ],
)
def test_a_pair_may_name_files_instead_of_numbers(lfw_dir, same, different):
  by_number, paths = read(lfw_dir, "1 1\nAl_Gore 1 2\nAl_Gore 2 Cher 1\n")
  by_file, same_paths = read(lfw_dir, f"1 1\n{same}\n{different}\n")
  assert same_paths == paths
  np.testing.assert_array_equal(by_file.pairs, by_number.pairs)


def test_a_missing_image_is_named(lfw_dir):
  (lfw_dir / "Cher" / "Cher_0001.jpg").unlink()
  with pytest.raises(errors.DataError, match=r"Cher/Cher_0001.jpg does not exist"):
    read(lfw_dir)


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("", "must start with folds"),
    ("Al_Gore 1 2\n", "must start with folds"),
    ("1 1\nAl_Gore 1 2\n", "has 1 pairs; its first line, '1 1', asks for 1 x 2"),
    ("1 1\nAl_Gore 1 2\nBo_Derek 1 2\n", "1 pairs of one person"),
    ("1 1\nAl_Gore 1 2\nCher 1 Cher 2\n", "'Cher 1 Cher 2' .* write `Cher 1 2`"),
    ("1 1\n/etc 1 2\nAl_Gore 1 Bo_Derek 2\n", "neither"),
    *(
      (f"1 1\nAl_Gore 1 2\n{line}\n", "neither")
      for line in (
        *("Al_Gore 1 two", "Al_Gore 1", "Al_Gore 1 Bo_Derek -2", ".. 1 Bo_Derek 2"),
        *("../../etc/passwd 1 Bo_Derek 2", "Al_Gore 1 Cher ../x.jpg"),
        "Al_Gore 1 Cher Al_Gore/Al_Gore_0001.jpg",
      )
    ),
  ],
)
def test_a_list_that_is_none_is_an_error(tmp_path, text, reason):
  path = tmp_path / "pairs.txt"
  path.write_text(text)
  with pytest.raises(errors.DataError, match=reason):
    lfw.read_pairs(str(path))


@pytest.mark.real_data
def test_the_official_lists_have_their_folds(real_data):
  pairs = lfw.read_pairs(str(real_data / "lfw" / "pairs.txt"))
  same = np.array([pair.same for pair in pairs]).reshape(10, 600)
  assert (same[:, :300]).all()
  assert not same[:, 300:].any()
  assert [pair.fold for pair in pairs[::600]] == list(range(10))
  first = pairs[0]
  assert first.first == "Abel_Pacheco/Abel_Pacheco_0001"
  assert first.second == "Abel_Pacheco/Abel_Pacheco_0004"
  view1 = lfw.read_pairs(str(real_data / "lfw" / "pairsDevTest.txt"))
  assert sum(pair.same for pair in view1) == 500
  assert {pair.fold for pair in view1} == {0}


def built(build_config, folder, **changes):
  """Returns the bytes of a build's shards and pairs; the build is removed."""
  config = build_config(folder, dataset="lfw", **changes)
  build.main(config)
  found = folders.files_of(config.output_dir)
  shutil.rmtree(config.output_dir)
  return {name: found[name] for name in found if name.endswith((".tfrecord", ".npy"))}


@pytest.mark.parametrize(
  "layout",
  [
    *("lfw-deepfunneled", "lfw_funneled/lfw_funneled", "flat", "deep/flat"),
    *("lfw.tar", "lfw.tgz", "lfw.tar.bz2", "flat.tgz"),
  ],
)
def test_every_layout_of_lfw_gives_the_same_shards(lfw_dir, build_config, layout):
  pairs = {"pairs": str(lfw_dir.parent / "pairs.txt")}
  whole = built(build_config, lfw_dir, **pairs)
  given = lfw_dir.parent / "given"
  if "flat" in layout:
    flat = given / ("images" if layout == "deep/flat" else "")
    flat.mkdir(parents=True)
    for path in lfw_dir.glob("*/*.jpg"):
      shutil.copy(path, flat)
    (given / "README").write_text("of the set")
  else:
    shutil.copytree(lfw_dir, given / layout)
  if "." in layout:
    mode = {"tar": "w", "tgz": "w:gz", "bz2": "w:bz2"}[layout.rpartition(".")[2]]
    with tarfile.open(lfw_dir.parent / layout, mode) as archive:
      archive.add(given if "flat" in layout else lfw_dir, "lfw")
    given = lfw_dir.parent / layout
  assert built(build_config, given, **pairs) == whole


def test_two_folders_of_people_are_not_guessed_between(lfw_dir, build_config):
  shutil.copytree(lfw_dir, lfw_dir.parent / "lfw-funneled")
  message = r"Bo_Derek in .*aligned and in .*funneled;"
  with pytest.raises(errors.DataError, match=message):
    built(build_config, lfw_dir.parent)


def test_a_compressed_archive_that_is_cut_off_or_lacks_an_image_is_refused(
  lfw_dir, build_config
):
  path = lfw_dir.parent / "lfw.tgz"
  with tarfile.open(path, "w:gz") as archive:
    archive.add(lfw_dir / "Al_Gore", "lfw/Al_Gore")
  message = r"lfw\.tgz/Bo_Derek/Bo_Derek_0001\.jpg does"
  with pytest.raises(errors.DataError, match=message):
    built(build_config, path)
  path.write_bytes(path.read_bytes()[:-2000])
  with pytest.raises(errors.DataError, match=r"lfw\.tgz is no whole compressed tar"):
    built(build_config, path)
  path.write_text("<html>")
  with pytest.raises(errors.DataError, match=r"lfw\.tgz is "):
    built(build_config, path)
