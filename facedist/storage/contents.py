"""What a file is that is not what its reader expects, told by its first bytes."""

HEAD_BYTES = 64
"""As many of a file's first bytes tell all that `kind_of` knows."""

_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_BY_START = (
  (
    _GIT_LFS,
    "a Git LFS pointer, not the file itself; run git lfs pull",
  ),
  (b"\x1f\x8b", "compressed with GZIP; write it again without compression"),
)
_WEB_PAGE = (b"<!doctype html", b"<html")
_ZLIB_LEVELS = (0x01, 0x5E, 0x9C, 0xDA)  # each makes 0x78.. a multiple of 31


def kind_of(content: bytes) -> str | None:
  """Returns what a file is that starts so, with what to do about it; or none.

  Ask only where `content` was found to be wrong: a few first bytes may be anything's.

  Args:
    content: The file's first HEAD_BYTES, or more.

  Returns:
    What completes the sentence "PATH is ...", without its full stop.
  """
  for start, kind in _BY_START:
    if content.startswith(start):
      return kind
  if len(content) > 1 and content[0] == 0x78 and content[1] in _ZLIB_LEVELS:
    return "compressed with ZLIB; write it again without compression"
  if content.lstrip()[:16].lower().startswith(_WEB_PAGE):
    return "a web page, such as a server's error; download it again"
  return None
