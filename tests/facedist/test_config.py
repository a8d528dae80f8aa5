"""facedist.config: a dataclass to flags, flags to a configuration, exit codes."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags

from facedist import config, errors
from facedist.config import flags as config_flags


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """One field of each kind."""

  data_dir: str = config.setting(help="Folder of shards.", heading="Data")
  batch: int = config.setting(8, help="Images.", at_least=1, at_most=64)
  rate: float = config.setting(
    0.1, help="Learning rate.", at_least=0, heading="Training"
  )
  flip: bool = config.setting(True, help="Whether images are mirrored.")
  debug: bool = config.setting(False, help="Whether more is logged.", may_change=True)
  strategy: str = config.setting("one", help="Devices.", choices=("one", "all"))
  cache_dir: str | None = config.setting(None, help="Local copies.", may_change=True)


def parse(*arguments: str) -> SampleConfig:
  """Returns the configuration of this command line."""
  values = flags.FlagValues()
  config.define_flags(SampleConfig, values)
  values(["command", *arguments])
  return config.from_flags(SampleConfig, values)


def test_each_kind_of_field_is_parsed_to_its_type_or_has_its_default():
  assert parse("--data_dir=a") == SampleConfig("a", 8, 0.1, True, False, "one", None)
  smallest = SampleConfig("a", batch=1, rate=0.0)
  assert parse("--data_dir=a", "--batch=1", "--rate=0") == smallest
  parsed = parse(
    "--data_dir=a", "--batch=64", "--rate=1e-3", "--noflip", "--debug",
    "--strategy=all", "--cache_dir=/c",
  )  # fmt: skip
  assert parsed == SampleConfig("a", 64, 0.001, False, True, "all", "/c")


@pytest.mark.parametrize(
  ("flag", "says"),
  [
    ("--batch=0", "--batch=0 must be at least 1"),
    ("--batch=65", "--batch=65 must be at most 64"),
    ("--rate=-1", "--rate=-1.0 must be at least 0"),
    ("--rate=nan", "--rate=nan must be a number between"),
    ("--rate=-inf", "--rate=-inf must be a number between"),
    ("--rate=1e300", r"--rate=1e\+300 must be a number between"),
    (f"--batch={2**70}", f"--batch={2**70} must be a number"),
    ("--strategy=tpu", "--strategy=tpu is not known; choose one of one, all"),
  ],
)
def test_a_value_that_breaks_its_rule_is_refused(flag: str, says: str):
  with pytest.raises(errors.UsageError, match=says):
    parse("--data_dir=a", flag)


def test_a_configuration_comes_back_from_json_as_it_was():
  original = SampleConfig("a", 16, 0.001, False, True, "all", None)
  text = config.to_json(original)
  assert list(json.loads(text)) == [
    "data_dir", "batch", "rate", "flip", "debug", "strategy", "cache_dir",
  ]  # fmt: skip
  assert config.from_json(SampleConfig, text, "w/config.json") == original


@pytest.mark.parametrize(
  "text", ["{", "[]", "3", '{"data_dir": "a", "gone": 1}', '{"batch": 8}']
)
def test_a_wrong_config_file_is_an_error_that_names_it(text: str):
  with pytest.raises(errors.ConfigError, match=r"w/config\.json is not a SampleConfig"):
    config.from_json(SampleConfig, text, "w/config.json")


def test_conflicts_name_what_differs_and_may_not():
  old = SampleConfig("a", batch=8, cache_dir="/c")
  new = SampleConfig("a", batch=16, debug=True, flip=False)
  assert config.conflicts(old, new) == ["batch: 8 -> 16", "flip: True -> False"]
  assert config.conflicts(old, old) == []


def test_help_shows_every_flag_in_its_order_with_default_and_rule():
  assert config.describe_flags(SampleConfig).splitlines() == [
    "",
    "Data:",
    "  --data_dir=  (required)",
    "      Folder of shards.",
    "  --batch=8  (1 to 64)",
    "      Images.",
    "",
    "Training:",
    "  --rate=0.1  (at least 0)",
    "      Learning rate.",
    "  --flip  (off: --noflip)",
    "      Whether images are mirrored.",
    "  --debug",
    "      Whether more is logged.",
    "  --strategy=one  (or all)",
    "      Devices.",
    "  --cache_dir=",
    "      Local copies.",
  ]


COMMAND = '''"""Counts faces.

  python count.py --faces=3
Prints what it counts.
"""
import dataclasses
from facedist import config, errors

@dataclasses.dataclass(frozen=True)
class CountConfig:
  faces: int = config.setting(help="How many.", at_least=0)
  debug: bool = config.setting(False, help="Whether more is logged.")

def main(settings):
  if settings.faces == 10: raise errors.DataError("10 faces are too many; take 9.")
  if settings.faces == 11: raise ValueError("a bug")
  if settings.faces == 12: return errors.ExitCode.PARTIAL
  print(settings.faces)

config.run_command(main, CountConfig)
'''


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A command module of a few lines."""
  path = tmp_path_factory.mktemp("command") / "count.py"
  path.write_text(COMMAND)
  return path


def run(command: pathlib.Path, *arguments: str) -> tuple[int, str, str]:
  """Runs the command; returns its exit code, stdout and stderr."""
  done = subprocess.run(
    [sys.executable, str(command), *arguments],
    check=False,
    capture_output=True,
    text=True,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
  ("arguments", "code", "stdout", "stderr"),
  [
    ("--faces=3", 0, "3\n", ""),
    ("--faces=12", 5, "", ""),
    ("", 2, "", "error: --faces is required: How many.\n"),
    ("--faces=-1", 2, "", "error: --faces=-1 must be at least 0.\n"),
    ("--faces=10", 4, "", "error: 10 faces are too many; take 9.\n"),
    (
      "--faces=3 more",
      2,
      "",
      "error: 'more' is not a flag; flags start with --, see --help.\n",
    ),
    (
      "--flagfile=none.flags",
      2,
      "",
      "error: --flagfile=none.flags cannot be read (No such file or directory); give "
      "a text file of flags.\n",
    ),
    (
      "--faces=3 --nodebug=true",
      2,
      "",
      "error: --nodebug=true does not take an argument. See --help.\n",
    ),
    (
      "--faces=3 --storage_deadline_seconds=0",
      2,
      "",
      "error: --storage_deadline_seconds=0.0 must be at least 1.\n",
    ),
  ],
)
def test_a_command_ends_with_its_exit_code_and_an_error_is_one_line(
  command: pathlib.Path, arguments: str, code: int, stdout: str, stderr: str
):
  assert run(command, *arguments.split()) == (code, stdout, stderr)


def test_help_to_a_reader_that_has_closed_is_no_error(command: pathlib.Path):
  reader, writer = os.pipe()
  os.close(reader)
  with os.fdopen(writer, "w") as closed:
    done = subprocess.run(
      [sys.executable, str(command), "--help"],
      check=False,
      stdout=closed,
      stderr=subprocess.PIPE,
    )
  assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("flag", ["--face=3", "--faces=many", "--faces"])
def test_a_wrong_flag_is_one_line_that_points_to_help(command: pathlib.Path, flag: str):
  code, stdout, stderr = run(command, flag)
  assert (code, stdout) == (2, "")
  (line,) = stderr.splitlines()
  assert line.startswith("error: ")
  assert "faces" in line
  assert line.endswith("See --help.")


def test_a_bug_keeps_its_traceback_and_exits_with_1(command: pathlib.Path):
  code, _, stderr = run(command, "--faces=11")
  assert code == 1
  assert stderr.rstrip().endswith("ValueError: a bug")


def test_help_teaches_and_exits_with_0(command: pathlib.Path):
  code, stdout, stderr = run(command, "-h")
  assert (code, stderr) == (0, "")
  example = "Counts faces.\n\n  python count.py --faces=3\nPrints what it counts.\n\n"
  assert stdout.startswith(example)
  assert "\nBuckets (any path may be gs://BUCKET/NAME):\n" in stdout
  assert "\n  --storage_deadline_seconds=300  (at least 1)\n" in stdout


def test_flag_files_hold_others(tmp_path: pathlib.Path):
  files = {
    "a": f"--one\n--flagfile={tmp_path / 'b'}\n--five",
    "b": f"# a comment\r\n--two\r\n--flagfile {tmp_path / 'c'}\r\n",
    "c": f"--three\n\n// another\n-flagfile={tmp_path / 'd'}\n",
    "d": "  --four\n",
  }
  for name, content in files.items():
    (tmp_path / name).write_bytes(content.encode())
  words = ["x", "--flagfile", str(tmp_path / "a"), "--six", "--", "--flagfile=z"]
  flat = ["x", "--one", "--two", "--three", "--four", "--five", *words[3:]]
  assert config_flags.expand(words) == flat
  assert config_flags.expand(["x", f"--flagfile={tmp_path / 'c'}"]) == ["x", *flat[3:5]]


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (("--flagfile",), "--flagfile names no file"),
    (("--flagfile={0}/a",), "{0}/a > {0}/b > {0}/a"),
    (("--flagfile=gs://faces/a",), "gs://faces/a is in a bucket; copy it to a disk"),
  ],
)
def test_a_flag_file_that_cannot_be_is_named(tmp_path: pathlib.Path, words, said: str):
  for name, other in ("ab", "ba"):
    (tmp_path / name).write_text(f"--flagfile={tmp_path / other}")
  words = [word.format(tmp_path) for word in words]
  with pytest.raises(errors.UsageError, match=re.escape(said.format(tmp_path))):
    config_flags.expand(["x", *words])


@pytest.mark.parametrize(
  ("content", "flag"),
  [
    ("\ufeff--faces=3\n", "--faces=3"),
    ("--workdir='/a b'\n", "--workdir=/a b"),
    ('"--workdir=/a b"\r\n', "--workdir=/a b"),
    ("--workdir=/run #1", "--workdir=/run #1"),
    ("--train_flags=--one=1 --two=2", "--train_flags=--one=1 --two=2"),
  ],
)
def test_a_flag_file_is_read_as_editors_write_it(tmp_path, content: str, flag: str):
  (tmp_path / "f").write_text(content)
  assert config_flags.expand(["x", f"--flagfile={tmp_path / 'f'}"]) == ["x", flag]


@pytest.mark.parametrize(
  ("line", "says"),
  [
    ("--faces=3 --debug", "has two flags"),
    ("--debug --faces=3", "has two flags"),
    ("--faces=3 # three", "has a comment behind a flag"),
    ("--faces=3 \\", "ends in a backslash"),
    ("--help", "is for the command line"),
    ("faces=3", "is not a flag"),
    ("--faces 3", "has a blank behind the name"),
  ],
)
def test_a_line_that_is_not_one_flag_is_named(tmp_path, line: str, says: str):
  (tmp_path / "f").write_text(f"# a comment\n{line}\n")
  with pytest.raises(errors.UsageError, match=rf"/f, line 2: .* {says}"):
    config_flags.expand(["x", f"--flagfile={tmp_path / 'f'}"])


def test_an_unknown_flag_in_a_file_is_named_with_its_line(command, tmp_path):
  path, outer = tmp_path / "f", tmp_path / "outer"
  path.write_text("--nodebug\n--faces=3\n")
  outer.write_text(f"--flagfile={path}\n")
  assert run(command, f"--flagfile={outer}") == (0, "3\n", "")
  path.write_text("--nodebug\n--faces=3\n--face=3\n")
  line = f"error: {path}, line 3: '--face=3' is no flag of this command; see --help.\n"
  assert run(command, f"--flagfile={path}") == (2, "", line)
