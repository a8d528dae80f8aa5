"""Flag files, which may lie in a bucket: each is replaced by the flags that it holds.

How a bucket is reached may itself be said by flags. So the files on disks are read
first; what they and the command line say of --storage_… holds for those in buckets.
"""

import re
from collections.abc import Iterator, Sequence

from absl import flags

from facedist import errors, storage
from facedist.config import common, paths
from facedist.config.parsing import define_flags

_DIRECTIVE = re.compile(r"--?flagfile(?:=|\s+)(.+)")

_QUOTED = re.compile(r"""((?:--?\w+=)?)(["'])(.*)\2""")
_TWO_FLAGS = re.compile(r"--?\w+(?:=[^-\s]\S*)?\s+--?[A-Za-z]")
_COMMENT = re.compile(r"\s#(?:\s|$)")


def expand(argv: Sequence[str], known: flags.FlagValues | None = None) -> list[str]:
  """Returns the command line with the flags of all flag files in their place.

  A file has a flag on each line, or a comment that starts with # or //, or
  --flagfile=FILE of another one. Names are relative to the folder of the process.

  Args:
    argv: The command line; what stands behind -- is left alone.
    known: The command's flags, which those in files must be among.

  Raises:
    errors.UsageError: A file cannot be read, or holds itself.
    errors.FacedistError: A file in a bucket cannot be read.
    flags.Error: A --storage_… flag has no value, or a wrong one.
  """
  joined = list(_joined(argv))
  if not any(map(_DIRECTIVE.fullmatch, joined)):
    return joined
  end = joined.index("--") if "--" in joined else len(joined)
  words = list(_expanded(joined[:end], (), known, into_buckets=False))
  if any(map(_DIRECTIVE.fullmatch, words)):
    _export_storage_flags(words)
    words = list(_expanded(words, (), known, into_buckets=True))
  return words + joined[end:]


def _joined(argv: Sequence[str]) -> Iterator[str]:
  """Yields the words; `--flagfile FILE` as one."""
  words = iter(argv)
  for word in words:
    if word not in ("--flagfile", "-flagfile"):
      yield word
    elif (name := next(words, None)) is not None:
      yield f"{word}={name}"
    else:
      raise errors.UsageError("--flagfile names no file; write --flagfile=FILE.")
    if word == "--":
      yield from words


def _expanded(
  words: Sequence[str],
  within: tuple[str, ...],
  known: flags.FlagValues | None,
  *,
  into_buckets: bool,
) -> Iterator[str]:
  """Yields the words, with what flag files hold in the place of their names.

  Args:
    words: Words of the command line or lines of a file.
    within: The files that these are in, the outermost first.
    known: The command's flags; none to take any.
    into_buckets: Whether those in a bucket are read too, not left as they are.
  """
  for word in words:
    found = _DIRECTIVE.fullmatch(word)
    path = paths.normalise("flagfile", found[1]) if found else ""
    if not found or (storage.is_bucket(path) and not into_buckets):
      yield word
      continue
    if path in within:
      raise errors.UsageError(
        f"--flagfile={path} holds itself ({' > '.join((*within, path))}); take it out "
        "of one of them."
      )
    inner = (*within, path)
    yield from _expanded(_lines(path, known), inner, known, into_buckets=into_buckets)


def _lines(path: str, known: flags.FlagValues | None) -> list[str]:
  """Returns the lines of a flag file without comments."""
  if storage.is_bucket(path):
    lines = list(storage.open_lines(path))
  else:
    try:  # not through storage, which asks for the size, that a shell's <(...) lacks
      with open(path, encoding="utf-8") as stream:
        lines = stream.readlines()
    except (OSError, UnicodeDecodeError) as error:
      reason = getattr(error, "strerror", None) or "it is not UTF-8"
      raise errors.UsageError(
        f"--flagfile={path} cannot be read ({reason}); give a text file of flags."
      ) from error
  found = []
  for number, line in enumerate(lines, 1):
    text = line.removeprefix("\ufeff").strip()
    if text and not text.startswith(("#", "//")):
      place = f"{path}, line {number}: {text!r}"
      flag = _flag_of(text, place)
      name = re.split(r"[=\s]", flag.lstrip("-"))[0]
      names = {name, name.removeprefix("no")}
      is_known = known is None or any(one in known for one in names)
      if not is_known and not _DIRECTIVE.fullmatch(flag):
        raise errors.UsageError(f"{place} is no flag of this command; see --help.")
      found.append(flag)
  return found


def _flag_of(text: str, place: str) -> str:
  """Returns the flag on a line, without quotes around it or its value.

  Raises:
    errors.UsageError: The line is not one flag.
  """
  if text.endswith("\\"):
    raise errors.UsageError(
      f"{place} ends in a backslash; write each flag in one line."
    )
  if quoted := _QUOTED.fullmatch(text):
    text = quoted[1] + quoted[3]
  if text in ("--help", "-help", "-h"):
    raise errors.UsageError(f"{place} is for the command line; take it out.")
  if not text.startswith("-"):
    raise errors.UsageError(f"{place} is not a flag; write --NAME=VALUE.")
  if _TWO_FLAGS.match(text):
    raise errors.UsageError(f"{place} has two flags; give each a line of its own.")
  if not quoted and _COMMENT.search(text):
    raise errors.UsageError(f"{place} has a comment behind a flag; put it above.")
  if not _DIRECTIVE.fullmatch(text) and re.match(r"--?\w+\s", text):
    raise errors.UsageError(f"{place} has a blank behind the name; write --NAME=VALUE.")
  return text


def _export_storage_flags(words: Sequence[str]) -> None:
  """Lets the common flags among the words hold from now on."""
  own = flags.FlagValues()
  own.set_gnu_getopt(True)  # goes on past values of flags that it does not know
  define_flags(common.CommonConfig, own)
  known = [word for word in words if not _DIRECTIVE.fullmatch(word)]
  own(known, known_only=True)
  common.export(own)
