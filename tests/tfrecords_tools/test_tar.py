import io
import tarfile

import pytest

from facedist import errors, storage
from facedist.data import image_names
from tests import files
from tfrecords_tools.sources import tar

LONG = "n000001/" + "x" * 240 + ".jpg"


def info_of(name, content=b"", **changes):
  info = tarfile.TarInfo(name)
  for key, value in {"size": len(content), **changes}.items():
    setattr(info, key, value)
  return info, content


GOOD = info_of("n1/0.jpg", b"good")


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


def refuse(path, reason):
  """Fails where the archive is not refused for this reason."""
  with pytest.raises(errors.DataError, match=f"faces.tar.*{reason}"):
    list(members_of(path))


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
    info_of("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
  ]
  path = written(*others, *members, form=form)
  assert contents_of(path) == {
    info.name.removeprefix("./"): content for info, content in members
  }


def test_members_that_are_no_images_are_counted(written):
  folders = ("train", "train/.Trash-0", "train/n1/@eaDir/1.jpg")
  images = ("train/.Trash-0/1.jpg", "train/n1/@eaDir/1.jpg/thumbnail.jpg")
  images += ("train/n1/._1.jpg", "train/n1/1.gif", "train/n1/1.TIF", "cover.jpg")
  path = written(
    *(info_of(f"./{name}", type=tarfile.DIRTYPE) for name in folders),
    *(info_of(f"./{name}", b"content") for name in images),
  )
  names = image_names.NameFilter()
  found = [one.path for one in tar.members(str(path), names)]
  assert found == ["train/n1/1.TIF", "cover.jpg"]
  assert names.left_out == {image_names.HIDDEN: 3, "files ending in .gif": 1}


def test_global_headers_that_only_comment_are_passed_over(written):
  comment = {"comment": "0123abcd"}
  path = written(GOOD, form=tarfile.PAX_FORMAT, pax_headers=comment)
  assert contents_of(path) == {"n1/0.jpg": b"good"}


def test_an_archive_that_is_cut_off_is_an_error_that_names_it(written):
  path = written(GOOD, info_of("n1/2.jpg", b"two" * 100))
  whole = path.read_bytes()
  for length in (3 * 512 + 299, 2 * 512 + 511, 512 + 2):
    path.write_bytes(whole[:length])
    refuse(path, r", byte \d+: ")


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
    refuse(written(GOOD, info_of(name, b"bad"), form=form), reason)


def test_bytes_of_a_name_that_are_no_text_are_escaped(written):
  path = written(GOOD)
  set_header(path, 0, 0, b"n1/\xff.jpg")
  assert contents_of(path) == {r"n1/\xff.jpg": b"good"}


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
  refuse(written(GOOD, info_of("n1/1.jpg", **changes)), reason)


def test_sparse_files_are_refused(written):
  path = written(info_of("n1/1.jpg", b"x" * 512))
  set_header(path, 0, 156, b"S")
  refuse(path, "is a sparse file")
  sparse_map = b"1\n0\n3\n".ljust(512, b"\0")
  headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
  sparse = info_of("n1/1.jpg", sparse_map + b"one", pax_headers=headers)
  refuse(written(sparse, form=tarfile.PAX_FORMAT), "is a sparse file")


def test_a_link_holds_no_content_whatever_size_it_claims(written):
  path = written(info_of("link", type=tarfile.SYMTYPE, linkname="x"), GOOD)
  set_header(path, 0, 124, b"00000001000\0")
  assert contents_of(path) == {"n1/0.jpg": b"good"}


@pytest.mark.parametrize(
  ("start", "size", "reason"),
  [
    (0, b"77777777777\0", "is cut off by the archive's end"),
    (0, b"\x80" + b"\xff" * 11, "is cut off by the archive's end"),
    (0, b"\xff" * 12, "is cut off by the archive's end"),
    (0, b"0000000x000\0", "invalid header"),
    (1024, b"00000002001\0", "is cut off by the archive's end"),
  ],
)
def test_a_size_that_cannot_be_is_refused(written, start, size, reason):
  path = written(GOOD, info_of("n1/1.jpg", b"good"))
  path.write_bytes(path.read_bytes()[: 2 * 1024])
  set_header(path, start, 124, size)
  refuse(path, f", byte .*{reason}")


@pytest.mark.parametrize("size", ["999999999999999999", "-99999"])
def test_an_extended_headers_size_that_cannot_be_is_refused(written, size):
  record = f" size={size}\n"
  content = f"{len(record) + 2}{record}".encode()
  path = written(info_of("about", content), GOOD)
  set_header(path, 0, 156, b"x")
  refuse(path, "is cut off by the archive's end")


def test_a_corrupt_header_is_found_by_its_checksum(written):
  path = written(GOOD, info_of("n1/1.jpg", b"good"))
  files.flip_byte(path, 1024 + 5)
  refuse(path, "byte 1024: the header is wrong")


def test_archives_joined_end_to_end_are_refused_rather_than_read_half(written):
  one = written(info_of("n1/1.jpg", b"x" * (2 << 20))).read_bytes()
  path = written()
  path.write_bytes(one + one)
  refuse(path, "continues after its end mark")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_archives_are_refused_with_what_to_do(tmp_path, mode):
  path = tmp_path / "faces.tar"
  with tarfile.open(path, mode) as archive:
    archive.addfile(GOOD[0], io.BytesIO(GOOD[1]))
  refuse(path, "is compressed.*unpack it to a plain")


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"no tar" * 200])
def test_what_is_no_tar_is_refused(tmp_path, content):
  path = tmp_path / "faces.tar"
  path.write_bytes(content)
  refuse(path, "no tar file")


def test_an_archive_in_a_bucket_is_read_by_large_ranges(written, bucket):
  members = [info_of(f"n1/{number}.jpg", b"x" * 700) for number in range(50)]
  path = written(*members)
  storage.upload(str(path), f"{bucket}/faces.tar")
  bucket.traffic.clear()
  found = [(one.path, one.start) for one in members_of(f"{bucket}/faces.tar")]
  assert found == [(one.path, one.start) for one in members_of(path)]
  assert bucket.traffic.requests() < 10
