"""Decides by their names which files are images, for all kinds of sources.

Folders, buckets, archives and lists all use a `NameFilter`, so the same tree of files
has the same images in each of them.
"""

import os
import re
from collections.abc import Mapping

ENDINGS = (
  *(".jpg", ".jpeg", ".png", ".jpe", ".jfif", ".bmp", ".dib", ".webp", ".tif"),
  *(".tiff", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".ras", ".sr"),
)
"""Of the files that `decoding.decode` reads; the case does not matter."""

HIDDEN = "hidden or system files and folders"
MISPLACED = "images above the identities' folders"
DEEPER = "images and folders deeper than identity/image"
_SYSTEM_NAMES = frozenset(
  (
    *("$recycle.bin", "recycler", "system volume information"),  # Windows
    *("thumbs.db", "ehthumbs.db", "desktop.ini"),
    *("__macosx", "network trash folder", "temporary items"),  # macOS
    *("@eadir", "#recycle", "#snapshot"),  # Synology
    *("@recycle", "@recently-snapshot", "@__thumb"),  # QNAP
    "lost+found",
  )
)
_ESCAPED_BYTE = re.compile(rb"\\x([89a-f][0-9a-f])")
_MAX_ENDINGS = 20  # more are counted together
_MAX_ENDING_LETTERS = 10


def is_system(name: str) -> bool:
  """Says whether a file or folder is hidden or belongs to the operating system."""
  is_hidden = name.startswith(".") and name not in (".", "..")
  return is_hidden or name.lower() in _SYSTEM_NAMES


def has_image_ending(name: str) -> bool:
  """Says whether a file's name ends as an image's does, in any case."""
  return name.lower().endswith(ENDINGS)


def escaped(name: str) -> str:
  """Returns a name on disk as text: bytes that are not UTF-8 become \\xNN.

  Records, manifests and logs hold text, and old folders have names in GBK or Latin-1.
  """
  return os.fsencode(name).decode(errors="backslashreplace")


def unescaped(path: str) -> str:
  """Returns the name on the disk of a path that `escaped` returned."""
  if "\\x" not in path:
    return path
  return os.fsdecode(
    _ESCAPED_BYTE.sub(lambda found: bytes.fromhex(found[1].decode()), os.fsencode(path))
  )


def on_disk(path: str) -> str:
  """Returns the name that a local file or folder has on disk; else `path` itself.

  A name with the four characters \\xNN has precedence over one with the byte.
  """
  if "\\x" not in path or os.path.lexists(path):
    return path
  return unescaped(path)


class NameFilter:
  """Selects images by their names, and counts what it leaves out.

  Attributes:
    left_out: How many files and folders each rule left out. A folder counts once, with
      all that is in it.
  """

  def __init__(self) -> None:
    self.left_out: dict[str, int] = {}
    self._folder = ""  # the last one that was left out

  def takes(self, path: str) -> bool:
    """Says whether a file is an image that lies in no system folder.

    Args:
      path: Below the source's folder, with forward slashes. Of a folder that is left
        out, the files should come one after another: it then counts once.
    """
    folder, _, name = path.rpartition("/")
    if folder:
      parts = folder.split("/")
      for place, part in enumerate(parts, 1):
        if is_system(part):
          return self.takes_folder("/".join(parts[:place]))
    return self.takes_file(name)

  def takes_folder(self, path: str) -> bool:
    """Says whether a folder may hold images, by the last part of its path."""
    if not is_system(path.rpartition("/")[2]):
      return True
    if path != self._folder:
      self._folder = path
      self.count(HIDDEN)
    return False

  def takes_file(self, name: str) -> bool:
    """Says whether a file of that name is an image."""
    if is_system(name):
      self.count(HIDDEN)
      return False
    if has_image_ending(name):
      return True
    if name:  # a bucket's placeholder for a folder has none
      self.count(self._rule_of(name))
    return False

  def count(self, rule: str) -> None:
    """Counts one more that a rule left out."""
    self.left_out[rule] = self.left_out.get(rule, 0) + 1

  def note(self) -> str:
    """Returns what an error adds if no image was found; empty if none was left out."""
    return f" (left out: {described(self.left_out)})" if self.left_out else ""

  def _rule_of(self, name: str) -> str:
    """Returns the rule that leaves out a file of this ending."""
    _, dot, ending = name.lower().rpartition(".")
    rule = f"files ending in .{ending}" if dot else "files without an ending"
    is_plain = ending.isalnum() and len(ending) <= _MAX_ENDING_LETTERS
    if rule in self.left_out or not dot:
      return rule
    has_room = len(self.left_out) < _MAX_ENDINGS
    return rule if is_plain and has_room else "files of other endings"


def described(left_out: Mapping[str, int]) -> str:
  """Returns the counts as text for a message; empty if nothing was left out."""
  return ", ".join(f"{rule}: {count:,}" for rule, count in left_out.items() if count)
