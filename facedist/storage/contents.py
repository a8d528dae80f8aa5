"""Recognises files that are not what their reader expects, by their first bytes."""

from facedist import errors

HEAD_BYTES = 64
"""How many first bytes of a file are enough to recognise it."""

_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_WEB_PAGE = (b"<!doctype html", b"<html")
_GZIP = b"\x1f\x8b"
_ZLIB = (b"x\x01", b"x\x5e", b"x\x9c", b"x\xda")


def kind_of_text(content: bytes) -> str | None:
  """Returns the kind of a text that replaces the real file; None if it is the file.

  Args:
    content: Its first HEAD_BYTES, or more.

  Returns:
    What completes the sentence "PATH is ...", with the fix and without a full stop.
  """
  if content.startswith(_GIT_LFS):
    return "a Git LFS pointer, not the file itself; run git lfs pull"
  if content[:HEAD_BYTES].lstrip().lower().startswith(_WEB_PAGE):
    return "a web page, such as a server's error; download it again"
  return None


def kind_of(content: bytes) -> str | None:
  """Returns the kind of a file whose content is not what was expected.

  Use it only for such a file: valid files may begin with the same two bytes as
  compressed ones.

  Returns:
    As `kind_of_text`.
  """
  if content.startswith(_GZIP):
    return "compressed with GZIP; write it again without compression"
  if content.startswith(_ZLIB):
    return "compressed with ZLIB; write it again without compression"
  return kind_of_text(content)


def refuse_kind(content: bytes, path: str) -> None:
  """Raises DataError for a file with unexpected content, if its kind is known."""
  if kind := kind_of(content):
    raise errors.DataError(f"{path} is {kind}.")
