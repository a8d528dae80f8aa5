import contextlib
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facedist import errors
from facedist.data import image_names
from tests import files
from tfrecords_tools.sources import tar

LONG = "n000001/" + "x" * 240 + ".jpg"


def info_of(name, content=b"", **changes):
  info = tarfile.TarInfo(name)
  info.size = len(content)
  for key, value in changes.items():
    setattr(info, key, value)
  return info, content


@pytest.fixture
def written(tmp_path):
  """Writes a tar file of (TarInfo, content)."""

  def write(*members, form=tarfile.GNU_FORMAT, **changes):
    path = tmp_path / "faces.tar"
    with tarfile.open(path, "w", format=form, **changes) as archive:
      for info, content in members:
        archive.addfile(info, io.BytesIO(content))
    return path

  return write


def members_of(path):
  return tar.members(str(path), image_names.NameFilter())


def contents_of(path):
  """Each image's bytes by its path, read by the places that the index tells."""
  whole = path.read_bytes()
  return {
    member.path: whole[member.start : member.start + member.length]
    for member in members_of(path)
  }


def set_header(path, start, field, value):
  """Overwrites a field of the header at byte `start` and corrects its checksum."""
  content = bytearray(path.read_bytes())
  block = content[start : start + 512]
  block[field : field + len(value)] = value
  block[148:156] = b" " * 8
  block[148:156] = b"%06o\0 " % sum(block)
  content[start : start + 512] = block
  path.write_bytes(content)


@pytest.mark.parametrize(
  "form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_images_lie_where_the_index_says_in_every_format(written, form):
  names = ["train/n000002/0001_01.jpg", "./n000001/a b.PNG", "n1/1.jpeg"]
  names += [f"{'d' * 90}/n000003/{'e' * 50}.jpg"]  # USTAR's prefix
  if form != tarfile.USTAR_FORMAT:
    names += [LONG, "n000001/é-人.jpg"]
  members = [
    info_of(name, bytes([number]) * (511 + number)) for number, name in enumerate(names)
  ]
  others = [
    info_of("train", type=tarfile.DIRTYPE),
    info_of("n000001/notes.txt", b"none"),
    info_of("n000001/._0001.jpg", b"hidden"),
    info_of("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
  ]
  path = written(*others, *members, form=form)
  assert contents_of(path) == {
    info.name.removeprefix("./"): content for info, content in members
  }


def test_members_that_are_no_images_are_counted(written):
  path = written(
    info_of("./train", type=tarfile.DIRTYPE),
    info_of("./train/.Trash-0", type=tarfile.DIRTYPE),
    info_of("./train/.Trash-0/1.jpg", b"gone"),
    info_of("./train/n1/@eaDir/1.jpg", type=tarfile.DIRTYPE),
    info_of("./train/n1/@eaDir/1.jpg/thumbnail.jpg", b"small"),
    info_of("./train/n1/._1.jpg", b"hidden"),
    info_of("./train/n1/1.gif", b"moving"),
    info_of("./train/n1/1.TIF", b"one"),
    info_of("./cover.jpg", b"above"),
  )
  names = image_names.NameFilter()
  found = [one.path for one in tar.members(str(path), names)]
  assert found == ["train/n1/1.TIF", "cover.jpg"]
  assert names.left_out == {image_names.HIDDEN: 3, "files ending in .gif": 1}


def test_global_headers_that_only_comment_are_passed_over(written):
  path = written(
    info_of("n1/1.jpg", b"one"),
    form=tarfile.PAX_FORMAT,
    pax_headers={"comment": "0123abcd"},
  )
  assert contents_of(path) == {"n1/1.jpg": b"one"}


def test_an_archive_that_is_cut_off_is_an_error_that_names_it(written):
  path = written(info_of("n1/1.jpg", b"one"), info_of("n1/2.jpg", b"two" * 100))
  whole = path.read_bytes()
  for length in (3 * 512 + 299, 2 * 512 + 511, 512 + 2):
    path.write_bytes(whole[:length])
    with pytest.raises(errors.DataError, match=r"faces.tar, byte \d+: "):
      contents_of(path)


def test_an_empty_archive_has_no_images(written):
  assert contents_of(written()) == {}


@pytest.mark.parametrize(
  ("name", "reason"),
  [
    ("/etc/n1/1.jpg", "leads out of the archive"),
    ("../n1/1.jpg", "leads out of the archive"),
    ("n1/../../1.jpg", "leads out of the archive"),
    ("n1/a\nn2/1.jpg", "has control characters"),
    ("n1/\x1b[2J.jpg", "has control characters"),
    ("/" + LONG, "leads out of the archive"),
  ],
)
def test_names_that_climb_or_deceive_are_refused(written, name, reason):
  for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
    path = written(info_of("n1/0.jpg", b"good"), info_of(name, b"bad"), form=form)
    with pytest.raises(errors.DataError, match=reason):
      contents_of(path)


def test_bytes_of_a_name_that_are_no_text_are_escaped(written):
  path = written(info_of("n1/1.jpg", b"one"))
  set_header(path, 0, 0, b"n1/\xff.jpg")
  assert contents_of(path) == {r"n1/\xff.jpg": b"one"}


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"type": tarfile.SYMTYPE, "linkname": "/etc/shadow"}, "is a symbolic link"),
    ({"type": tarfile.LNKTYPE, "linkname": "n1/0.jpg"}, "is a hard link"),
    ({"type": tarfile.CHRTYPE}, "is a device"),
    ({"type": tarfile.BLKTYPE}, "is a device"),
    ({"type": tarfile.FIFOTYPE}, "is a pipe"),
    ({"type": b"Q"}, "is no file"),
  ],
)
def test_an_image_that_is_no_regular_file_is_refused(written, changes, reason):
  path = written(info_of("n1/0.jpg", b"good"), info_of("n1/1.jpg", **changes))
  with pytest.raises(errors.DataError, match=reason):
    contents_of(path)


def test_sparse_files_are_refused(written):
  path = written(info_of("n1/1.jpg", b"x" * 512))
  set_header(path, 0, 156, b"S")
  with pytest.raises(errors.DataError, match="is a sparse file"):
    contents_of(path)
  sparse_map = b"1\n0\n3\n".ljust(512, b"\0")
  info, content = info_of("n1/1.jpg", sparse_map + b"one")
  info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
  path = written((info, content), form=tarfile.PAX_FORMAT)
  with pytest.raises(errors.DataError, match="is a sparse file"):
    contents_of(path)


def test_a_link_holds_no_content_whatever_size_it_claims(written):
  link = info_of("link", type=tarfile.SYMTYPE, linkname="x")
  path = written(link, info_of("n1/1.jpg", b"one"))
  set_header(path, 0, 124, b"00000001000\0")
  assert contents_of(path) == {"n1/1.jpg": b"one"}


@pytest.mark.parametrize(
  ("start", "field", "value", "reason"),
  [
    (0, 124, b"77777777777\0", "is cut off by the archive's end"),
    (0, 124, b"\x80" + b"\xff" * 11, "is cut off by the archive's end"),
    (0, 124, b"\xff" * 12, "is cut off by the archive's end"),
    (0, 124, b"0000000x000\0", "invalid header"),
    (1024, 124, b"00000002001\0", "is cut off by the archive's end"),
  ],
)
def test_a_size_that_cannot_be_is_refused(written, start, field, value, reason):
  path = written(info_of("n1/0.jpg", b"good"), info_of("n1/1.jpg", b"good"))
  content = path.read_bytes()[: 2 * 1024]
  path.write_bytes(content)
  set_header(path, start, field, value)
  with pytest.raises(errors.DataError, match=f"faces.tar, byte .*{reason}"):
    contents_of(path)


@pytest.mark.parametrize("size", ["999999999999999999", "-99999"])
def test_an_extended_headers_size_that_cannot_be_is_refused(written, size):
  record = f" size={size}\n"
  content = f"{len(record) + 2}{record}".encode()
  path = written(
    info_of("about", content, type=tarfile.REGTYPE), info_of("n1/1.jpg", b"one")
  )
  set_header(path, 0, 156, b"x")
  with pytest.raises(errors.DataError, match="is cut off by the archive's end"):
    contents_of(path)


def test_a_corrupt_header_is_found_by_its_checksum(written):
  path = written(info_of("n1/0.jpg", b"good"), info_of("n1/1.jpg", b"good"))
  files.flip_byte(path, 1024 + 5)
  with pytest.raises(errors.DataError, match="byte 1024: the header is wrong"):
    contents_of(path)


def test_archives_joined_end_to_end_are_refused_rather_than_read_half(written):
  one = written(info_of("n1/1.jpg", b"x" * (2 << 20))).read_bytes()
  path = written()
  path.write_bytes(one + one)
  with pytest.raises(errors.DataError, match="continues after its end mark"):
    contents_of(path)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_archives_are_refused_with_what_to_do(tmp_path, mode):
  path = tmp_path / "faces.tar"
  with tarfile.open(path, mode) as archive:
    archive.addfile(info_of("n1/1.jpg", b"one")[0], io.BytesIO(b"one"))
  with pytest.raises(errors.DataError, match=r"is compressed.*unpack it to a plain"):
    contents_of(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"no tar" * 200])
def test_what_is_no_tar_is_refused(tmp_path, content):
  path = tmp_path / "faces.tar"
  path.write_bytes(content)
  with pytest.raises(errors.DataError, match="no tar file"):
    contents_of(path)


@given(
  content=st.binary(max_size=1500)
  | st.binary(min_size=512, max_size=512).map(lambda block: block * 3)
)
def test_any_bytes_are_an_archive_or_an_error(tmp_path_factory, content):
  path = tmp_path_factory.mktemp("tar") / "faces.tar"
  path.write_bytes(content)
  with contextlib.suppress(errors.DataError):
    assert all(image in content for image in contents_of(path).values())


def test_an_archive_in_a_bucket_is_read_by_large_ranges(written, bucket):
  from facedist import storage

  members = [info_of(f"n1/{number}.jpg", b"x" * 700) for number in range(50)]
  path = written(*members)
  storage.upload(str(path), f"{bucket}/faces.tar")
  bucket.traffic.clear()
  found = [(one.path, one.start) for one in members_of(f"{bucket}/faces.tar")]
  assert found == [(one.path, one.start) for one in members_of(path)]
  assert bucket.traffic.requests() < 10
