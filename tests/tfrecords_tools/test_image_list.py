import pytest

from facedist import errors
from facedist.data import image_names
from tfrecords_tools.sources import base, image_list


def paths_of(groups):
  return [path for group in groups for path in group.paths]


@pytest.fixture
def listed(tmp_path):
  """Reads a list of paths with this text; returns groups, origins and the filter."""

  def read(text, input_dir="/faces", *, max_checked=0, labels_are_identities=False):
    path = tmp_path / "images.txt"
    path.write_text(text)
    names, origins = image_names.NameFilter(), []
    groups = image_list.from_input_list(
      str(path),
      input_dir,
      labels_are_identities=labels_are_identities,
      names=names,
      origins=origins,
      max_checked=max_checked,
    )
    return list(groups), origins, names

  return read


@pytest.fixture
def chosen(vggface2_dir):
  """Reads a list with this text of images of the folder; returns their paths."""

  def read(text):
    path = vggface2_dir.parent / "some.txt"
    path.write_text(text)
    names = image_names.NameFilter()
    return paths_of(
      image_list.from_image_list(str(vggface2_dir), str(path), names=names)
    )

  return read


def test_a_list_says_which_images_to_take(chosen):
  found = chosen("n000003/0002_01.jpg\nn000001/0003_01.jpg\n")
  assert found == ["n000001/0003_01.jpg", "n000003/0002_01.jpg"]


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
def test_a_list_that_does_not_fit_is_an_error(chosen, text, reason):
  with pytest.raises(errors.DataError, match=reason):
    chosen(text)


def test_a_path_list_may_name_images_anywhere(listed):
  groups, origins, _ = listed(
    "# by hand\nb/2.jpg\n/data/x/a/1.jpg\ngs://faces/deep/down/c/3.jpg\n"
    "more/b/1.jpg\n/data/x/a/0.jpg\n\n/d/4.jpg\n"
  )
  found = [
    (path, origins[row["origin"]])
    for group in groups
    for path, row in zip(group.paths, group.rows, strict=True)
  ]
  assert found == [
    *(("a/0.jpg", "/data/x"), ("a/1.jpg", "/data/x"), ("b/1.jpg", "/faces/more")),
    *(("b/2.jpg", "/faces"), ("c/3.jpg", "gs://faces/deep/down"), ("d/4.jpg", "/")),
  ]
  assert all((group.rows["length"] == base.WHOLE).all() for group in groups)


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("a/1.jpg\n/other/a/1.jpg\n", "a/1.jpg comes twice, in /faces and in /other"),
    *(
      (f"{line}\n", "does not end in identity/image")
      for line in ("/1.jpg", "a/", "a/../b/1.jpg", "gs://faces/1.jpg")
    ),
    ("# none\n", "lists no image"),
  ],
)
def test_a_path_list_that_does_not_fit_is_an_error(listed, text, reason):
  with pytest.raises(errors.DataError, match=reason):
    listed(text)


def test_a_relative_path_needs_a_folder(listed):
  with pytest.raises(errors.DataError, match="say from which --input_dir"):
    listed("a/1.jpg\n", None)


def test_listed_thumbnails_and_other_files_are_left_out_and_counted(listed):
  lines = ("n1/1.JFIF", "n1/@eaDir/1.jpg/thumb.jpg", "n1/@eaDir/2.jpg/thumb.jpg")
  lines += ("/faces/n1/2.jpg", "/faces/.Trash-0/files/n1/3.jpg", "n1/Thumbs.db")
  lines += ("/faces/n2/4.gif", "./n2/5.webp")
  groups, _, names = listed("\n".join(lines))
  assert paths_of(groups) == ["n1/1.JFIF", "n1/2.jpg", "n2/5.webp"]
  assert names.left_out == {image_names.HIDDEN: 3, "files ending in .gif": 1}


def test_a_hidden_folder_above_the_input_may_hold_it(listed):
  text = "/home/me/.cache/faces/n1/1.jpg\n"
  assert paths_of(listed(text, "/home/me/.cache/faces/")[0]) == ["n1/1.jpg"]
  with pytest.raises(errors.DataError, match=r"no image \(left out: hidden .*: 1\)"):
    listed(text, None)


@pytest.mark.parametrize(
  "text",
  [
    *("filename\n{}\n{}\n", "{} 0\n{} 1\n", "{}  Anna B\n{}  Bo\n", "{}\t0\n{}\t1\n"),
    *("{},0\n{}, 1\n", "{}\t 0\n{} \t1\n", '"path","label"\n"{}",0\n"{}",1\n'),
    *("17\t0\t{}\n4\t1.000000\t{}\n", "0\t2\t5\t1.5\t{}\n1\t2\t5\t1.5\t{}\n"),
    *("label,image_path\n0,{}\n1,{}\n", "image label\n{} 0\n{} 1\n"),
    *("id\tfile\tsplit\n0\t{}\ttrain\n1\t{}\ttrain\n", "n/1.gif 0\n{} 0\n{} 1\n"),
  ],
)
@pytest.mark.parametrize("paths", [("a/1.jpg", "b/2.PNG"), ("a, b/1.jpg", "c d/2.jpg")])
def test_a_list_may_have_a_header_labels_or_an_index(listed, tmp_path, text, paths):
  assert paths_of(listed(text.format(*paths))[0]) == list(paths)
  found = image_list.paths_by_identity(
    str(tmp_path / "images.txt"), names=image_names.NameFilter()
  )
  assert [one for _, images in found for one in images] == list(paths)


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("# mine\na/1.jpg 0\n\na/2.jpg\n", r"images\.txt, line 4: 'a/2.jpg' reads as"),
    ("a/1.jpg\na/2.jpg,1\n", "line 2: 'a/2.jpg,1' reads as 'path,label'"),
    ("label,path\n0,a/1.jpg\na/2.jpg\n", "line 3: 'a/2.jpg' lacks a column"),
    ("a/1.jpg\n../1.jpg\n", "2: '../1.jpg' (does not end in|is not) identity/image"),
  ],
)
def test_a_line_unlike_the_others_is_quoted_with_its_number(
  listed, tmp_path, text, reason
):
  with pytest.raises(errors.DataError, match=reason):
    listed(text)
  path, names = str(tmp_path / "images.txt"), image_names.NameFilter()
  with pytest.raises(errors.DataError, match=reason):
    list(image_list.paths_by_identity(path, names=names))


def test_a_line_that_names_no_file_is_quoted_with_its_number(listed, vggface2_dir):
  text = "path label\nn000001/0001_01.jpg 0\nn000001/none.jpg 0\n"
  with pytest.raises(errors.DataError, match=r"line 3: 'n000001/none\.jpg 0' names /"):
    listed(text, str(vggface2_dir), max_checked=9)


@pytest.mark.parametrize(
  ("text", "labels"),
  [
    ("{} 7\n{} 12\n", ["12", "7"]),
    ("{}\tAnna B\n{}\tBo\n", ["Anna B", "Bo"]),
    ("{},7\n{}, 12\n", ["12", "7"]),
    ('"{}","7"\n"{}","12"\n', ["12", "7"]),
    ("17\t7.000000\t{}\n4\t12.0\t{}\n", ["12", "7"]),
    ("path,label\n{},7.0\n{},12.0\n", ["12", "7"]),
    ("n,identity,file,size\n0,7,{},3\n1,12,{},3\n", ["12", "7"]),
    ("file\tsize\tperson\n{}\t3\t7\n{}\t3\t12\n", ["12", "7"]),
    ("Thumbs.db\n{} 7\n{} 12\n", ["12", "7"]),
  ],
)
def test_labels_of_a_list_may_be_the_identities(listed, text, labels):
  text = text.format("1.jpg", "a/b/c/1.jpg")
  groups, origins, _ = listed(text, "/faces/", labels_are_identities=True)
  assert [group.identity for group in groups] == labels
  files = [base.files_of(one.rows, one.paths, origins=origins) for one in groups]
  assert sorted(files) == [["/faces/1.jpg"], ["/faces/a/b/c/1.jpg"]]
  assert [base.identity_of(path) for path in paths_of(groups)] == labels


def test_labelled_images_may_lie_anywhere(listed):
  (group,), origins, _ = listed(
    "/faces/x/1.jpg 3\n/data/y/a/1.jpg 3\ngs://faces/deep/c/1.jpg 3\n./x/2.jpg 3\n",
    labels_are_identities=True,
  )
  assert group.paths == ["3/a/1.jpg", "3/c/1.jpg", "3/x/1.jpg", "3/x/2.jpg"]
  expected = ["/data/y/a/1.jpg", "gs://faces/deep/c/1.jpg"]
  expected += ["/faces/x/1.jpg", "/faces/x/2.jpg"]
  assert base.files_of(group.rows, group.paths, origins=origins) == expected


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("a/1.jpg\n", "images.txt, line 1: 'a/1.jpg' has no label"),
    ("path\na/1.jpg\n", "line 2: 'a/1.jpg' has no label"),
    ("path,split\na/1.jpg,3\n", "line 2: .* has no label"),
    ("path,label,target\na/1.jpg,3,4\n", "line 2: .* has no label, or several"),
    ("path,label\na/1.jpg,\n", "line 2: .* has no label"),
    ("a/1.jpg 3\na/2.jpg 3 0.5 0.5\n", "line 2: .* has no label, or several"),
    ("0\t2\t5\t1.5\ta/1.jpg\n", "line 1: .* has no label, or several"),
    ("a/1.jpg n/3\n", "line 1: .* has the label 'n/3'"),
    ("a/1.jpg ..\n", "line 1: .* has the label '..'"),
    ("a/1.jpg 3\na/1.jpg 3\n", "3/a/1.jpg comes twice"),
  ],
)
def test_a_label_that_is_no_identity_is_an_error(listed, text, reason):
  with pytest.raises(errors.DataError, match=reason):
    listed(text, labels_are_identities=True)
