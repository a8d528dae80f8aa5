"""Every path flag of every command with paths that lead nowhere: always one line."""

import contextlib
import importlib
import json
import os
import pathlib
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pytest

from facedist import config, errors, storage
from facedist.training import inference
from facedist.training.config import TrainConfig
from tests import noise_sets
from tests.test_paths_of_flags import MODULES, flags_of_text, kind_of

SIZE = 16
LONG = "a" * 300
_NOBODY = 65534

BAD: dict[str, Callable[[pathlib.Path], str]] = {
  "a file": lambda folder: str(folder / "file"),
  "a folder": lambda folder: str(folder / "folder"),
  "below a file": lambda folder: str(folder / "file" / "x"),
  "missing": lambda folder: str(folder / "missing" / "x"),
  "too long": lambda folder: str(folder / LONG),
  "too long below": lambda folder: str(folder / "new" / LONG / "x"),
  "a link to itself": lambda folder: str(folder / "circle" / "x"),
  "not permitted": lambda folder: "/sys/kernel/x",
  "no place for files": lambda folder: "/proc/self/x",
  "a device": lambda folder: "/dev/null",
}
A_NEW_FOLDER = set(BAD) - {"a folder", "missing"}  # where these two are right
A_NEW_FILE = set(BAD) - {"a file", "missing"}
A_FILE = set(BAD) - {"a file"}
A_TEXT = A_FILE - {"a device"}  # which is an empty list

# command, further flags, and what is bad for each path flag
SWEEP: tuple[tuple[str, dict[str, str], dict[str, set[str]]], ...] = (
  (
    "tfrecords_tools.build",
    {"dataset": "vggface2", "input_dir": "images", "output_dir": "new"},
    {
      "output_dir": A_NEW_FOLDER,
      "input_dir": set(BAD),
      "input_list": set(BAD),
      "scratch_dir": A_NEW_FOLDER,
      "image_list": set(BAD),
      "landmarks": set(BAD),
      "bounding_boxes": set(BAD),
      "lfw_names": A_TEXT,
      "identities": A_TEXT,
      "exclude_identities": A_TEXT,
      "identity_meta": A_TEXT,
    },
  ),
  (
    "tfrecords_tools.build",
    {"dataset": "lfw", "input_dir": "images", "output_dir": "new"},
    {"pairs": set(BAD)},
  ),
  (
    "tfrecords_tools.build",
    {"dataset": "bin", "output_dir": "new"},
    {"input_dir": set(BAD)},
  ),
  (
    "tfrecords_tools.build",
    {"dataset": "rec", "output_dir": "new"},
    {"input_dir": set(BAD)},
  ),
  (
    "tfrecords_tools.build",
    {"dataset": "webdataset", "output_dir": "new"},
    {"input_dir": set(BAD)},
  ),
  (
    "tfrecords_tools.build",
    {"dataset": "pairs", "input_dir": "images", "output_dir": "new"},
    {"pairs": set(BAD)},
  ),
  (
    "tfrecords_tools.build",
    {"dataset": "npz", "output_dir": "new"},
    {"input_dir": set(BAD)},
  ),
  (
    "tfrecords_tools.align",
    {"input_dir": "images", "output_dir": "new"},
    {
      "output_dir": A_NEW_FOLDER,
      "input_dir": set(BAD),
      "input_list": set(BAD),
      "compare_with": set(BAD),
      "yunet": set(BAD),
      "scratch_dir": A_NEW_FOLDER,
    },
  ),
  (
    "tfrecords_tools.verify",
    {"data_dir": "shards"},
    {"data_dir": set(BAD), "report": A_NEW_FILE},
  ),
  ("tfrecords_tools.rebuild_index", {}, {"data_dir": set(BAD)}),
  (
    "tfrecords_tools.inspect",
    {"data_dir": "shards"},
    {
      "data_dir": set(BAD),
      "diff": set(BAD),
      "report": A_NEW_FILE,
      "pictures": A_NEW_FOLDER,
    },
  ),
  (
    "tfrecords_tools.inspect",
    {"data_dir": "shards", "diff": "shards"},
    {"scratch_dir": A_NEW_FOLDER},
  ),
  (
    "tfrecords_tools.find_overlap",
    {"embeddings": "embeddings.json", "others": "embeddings.json"},
    {
      "embeddings": set(BAD),
      "others": set(BAD),
      "report": A_NEW_FILE,
      "write_excluded": A_NEW_FILE,
      "lfw_names": set(BAD),
      "identity_meta": A_TEXT,
    },
  ),
  (
    "tfrecords_tools.select",
    {"input_dirs": "shards", "output_dir": "new"},
    {
      "input_dirs": set(BAD),
      "output_dir": A_NEW_FOLDER,
      "identities": A_TEXT,
      "exclude_identities": A_TEXT,
      "relabel": A_TEXT,
    },
  ),
  ("tfrecords_tools.synthetic_faces", {}, {"output_dir": A_NEW_FOLDER}),
  (
    "facedist.doctor",
    {"data_dir": "shards", "workdir": "new", "backbone_weights": "none"},
    {
      "data_dir": set(BAD),
      "workdir": A_NEW_FOLDER,
      "backbone_weights": set(BAD),
    },
  ),
  (
    "facedist.embed",
    {"workdir": "run", "input": "images", "output": "new.json"},
    {
      "workdir": set(BAD),
      "checkpoint": set(BAD),
      "input": set(BAD),
      "output": A_NEW_FILE,
      "plot": set(BAD),  # such a picture's name does not end in .png
      "yunet": set(BAD),
    },
  ),
  (
    "facedist.identify",
    {"embeddings": "labelled.json"},
    {"embeddings": set(BAD), "gallery": set(BAD), "groups": set(BAD)},
  ),
  (
    "facedist.search",
    {"gallery": "labelled.json", "query": "labelled.json"},
    {"gallery": set(BAD), "query": set(BAD)},
  ),
  (
    "facedist.templates",
    {
      "protocol": "tinyface",
      "data": "tiny",
      "embeddings": "tiny.json",
      "workdir": "run",
      "output": "new.json",
    },
    {
      "data": set(BAD),
      "embeddings": set(BAD),  # such a file's name does not end in .npz
      "workdir": set(BAD),
      "checkpoint": set(BAD),
      "output": A_NEW_FILE,
    },
  ),
  (
    "facedist.compare",
    {"workdir": "run", "first": "images/n1/1.jpg", "second": "images/n2/1.jpg"},
    {
      "first": set(BAD),
      "second": set(BAD),
      "workdir": set(BAD),
      "checkpoint": set(BAD),
      "yunet": set(BAD),
    },
  ),
  (
    "facedist.report",
    {"workdir": "run"},
    {"workdir": set(BAD), "output": A_NEW_FILE},
  ),
  (
    "facedist.export",
    {"workdir": "run", "output": "new"},
    {
      "workdir": set(BAD),
      "checkpoint": set(BAD),
      "output": A_NEW_FOLDER,
      "verification_data": set(BAD),
    },
  ),
  (
    "facedist.export",
    {"workdir": "run", "output": "new.tflite", "precision": "int8"},
    {"calibration": set(BAD)},
  ),
  (
    "facedist.evaluate",
    {"workdir": "run", "verification_data": "shards"},
    {
      "workdir": set(BAD),
      "checkpoint": set(BAD),
      "verification_data": set(BAD),
      "groups": set(BAD),
    },
  ),
)
WORDS = {"dataset", "backbone_weights", "protocol"}  # flags that are no paths
OUTPUTS = {"output", "output_dir", "pictures", "report", "write_excluded"}
ELSEWHERE = {
  "cache_dir",  # of a bucket's shards alone: tests/facedist/data/test_shard_cache.py
  "heartbeat_file",  # tests/facedist/training/test_guard.py
}


def cases() -> list[tuple[str, dict[str, str], str, str]]:
  """Returns command, further flags, the path flag and what is bad about its path."""
  return [
    (module, others, flag, bad)
    for module, others, flags in SWEEP
    for flag, kinds in flags.items()
    for bad in sorted(kinds)
  ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with what the commands need, and with what they cannot use."""
  folder = tmp_path_factory.mktemp("paths")
  noise_sets.write(folder / "shards", identities=2, images=2, size=32)
  tiny = [
    f"tiny/{name}"
    for name in ("Probe/1_1", "Gallery_Match/1_2", "Gallery_Distractor/a")
  ]
  for name in ("images/n1/1", "images/n2/1", *tiny):
    path = folder / f"{name}.jpg"
    path.parent.mkdir(parents=True)
    assert cv2.imwrite(str(path), np.zeros((SIZE, SIZE, 3), np.uint8))
  (folder / "file").write_bytes(b"\x00\xff no face, \x80 no text\n")
  (folder / "folder" / "nothing").mkdir(parents=True)
  (folder / "circle").symlink_to(folder / "circle")
  (folder / "embeddings.json").write_text("{\n}\n")
  (folder / "labelled.json").write_text(
    '{\n"embeddings": [\n'
    '{"path": "n1/1.jpg", "identity": "n1", "embedding": [1, 0]},\n'
    '{"path": "n1/2.jpg", "identity": "n1", "embedding": [1, 0]},\n'
    '{"path": "n2/1.jpg", "identity": "n2", "embedding": [0, 1]}\n'
    '],\n"skipped": []\n}\n'
  )
  lines = ",\n".join(
    f'{{"path": "{name[5:]}.jpg", "identity": null, "embedding": [1, 0]}}'
    for name in tiny
  )
  (folder / "tiny.json").write_text(
    f'{{\n"embeddings": [\n{lines}\n],\n"skipped": []\n}}\n'
  )
  (folder / "run" / "checkpoints").mkdir(parents=True)
  (folder / "run" / "config.json").write_text(config.to_json(TrainConfig()))
  saved = folder / "run" / "checkpoints" / "step-00000001"
  saved.with_suffix(".index").write_bytes(b"")
  facts = {"step": 1, "image_size": SIZE, "files": {"a": {"crc32c": 1}}}
  saved.with_suffix(".json").write_text(json.dumps(facts))
  return folder


def settings_of(module: types.ModuleType, values: dict[str, object]) -> object:
  """Returns the command's configuration with these flags."""
  names = ("Build", "Verify", "Index", "Inspect", "Overlap", "Select", "Faces")
  for name in (
    *names,
    "Doctor",
    "Embed",
    "Export",
    "Evaluate",
    "Identify",
    "Compare",
    "Search",
    "Align",
    "Report",
    "Templates",
  ):
    for owner in (module, getattr(module, "options", module)):
      if kind := getattr(owner, f"{name}Config", None):
        return kind(**values)
  raise AssertionError(module)


def error_of(module_name: str, values: dict[str, object]) -> str:
  """Runs a command in this process; returns the line that it ends with."""
  module = importlib.import_module(module_name)
  known = {field.name for field in flags_of_text(module_name)}
  extra: dict[str, object] = {}
  if module_name == "facedist.doctor":
    extra = {"quick": True, "strategy": "one"}
  if module_name == "facedist.evaluate":
    extra = {"once": True} if "checkpoint" not in values else {}
  if module_name == "facedist.embed":
    extra = {"align": "yunet" in values}
  if module_name == "tfrecords_tools.synthetic_faces":
    extra = {"num_identities": 1, "images_per_identity": 1, "num_processes": 1}
  assert set(values) <= known
  error: errors.FacedistError | None = None
  code = 0
  try:
    code = module.main(settings_of(module, values | extra))
  except errors.FacedistError as raised:
    error, code = raised, raised.exit_code
  except OSError as raised:  # as config.run_command ends with it
    if (error := storage.explain(raised)) is None:
      raise
    code = error.exit_code
  assert code in (errors.ExitCode.USAGE, errors.ExitCode.CONFIG, errors.ExitCode.DATA)
  return str(error or "")


@pytest.mark.parametrize(
  ("module", "others", "flag", "bad"),
  cases(),
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_path_is_one_line_and_nothing_is_left_behind(
  place: pathlib.Path,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  module: str,
  others: dict[str, str],
  flag: str,
  bad: str,
):
  monkeypatch.setattr(inference, "load_network", lambda *_, **__: _Network())
  values: dict[str, object] = {
    name: path if name in WORDS else str(place / path) for name, path in others.items()
  }
  if "output_dir" in values or "output" in values:
    name = "output_dir" if "output_dir" in values else "output"
    values[name] = str(tmp_path / "output")
  if "workdir" in values and others["workdir"] == "new":
    values["workdir"] = str(tmp_path / "workdir")
  path = BAD[bad](place)
  before = sorted(place.rglob("*"))
  line = error_of(module, values | {flag: path})
  assert "\n" not in line
  if flag in OUTPUTS:
    assert line.startswith(f"--{flag}=") or "synthetic_faces" in module, line
    assert path in line
    assert sorted(place.rglob("*")) == before
  assert not list(tmp_path.rglob("*.partial-*"))


@pytest.fixture
def open_folder() -> Iterator[pathlib.Path]:
  """An empty folder that every user may enter and change."""
  with tempfile.TemporaryDirectory(prefix="facedist-test-") as folder:
    os.chmod(folder, 0o777)
    yield pathlib.Path(folder)


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
  """Lets the system's permissions hold for the body, also where root runs the tests."""
  user = os.geteuid()
  if not user:
    os.seteuid(_NOBODY)
  try:
    yield
  finally:
    os.seteuid(user)


@pytest.mark.parametrize(
  ("locked", "mode", "module", "others"),
  [
    ("images/n1", 0, "tfrecords_tools.build", {"dataset": "vggface2"}),
    ("images", 0, "tfrecords_tools.build", {"dataset": "vggface2"}),
    ("shards/manifest.json", 0, "tfrecords_tools.verify", {"data_dir": "shards"}),
    ("shards", 0, "tfrecords_tools.verify", {"data_dir": "shards"}),
    ("shards", 0, "tfrecords_tools.rebuild_index", {"data_dir": "shards"}),
    (
      "shards",
      0,
      "facedist.evaluate",
      {"workdir": "run", "checkpoint": "1"},
    ),
    ("run", 0o555, "facedist.evaluate", {"workdir": "run"}),
    ("run/config.json", 0, "facedist.doctor", {"workdir": "run"}),
    ("run", 0o555, "facedist.doctor", {"workdir": "run"}),
    ("out", 0o555, "facedist.embed", {"output": "out/new.json"}),
    ("out", 0o555, "facedist.export", {"output": "out/new"}),
    ("out", 0o555, "tfrecords_tools.build", {"output_dir": "out", "dataset": "digits"}),
    ("out", 0o555, "tfrecords_tools.select", {"output_dir": "out/new"}),
    ("out", 0o555, "tfrecords_tools.synthetic_faces", {"output_dir": "out/new"}),
    (
      "out",
      0o555,
      "tfrecords_tools.inspect",
      {"report": "out/new", "data_dir": "shards"},
    ),
  ],
)
def test_what_this_user_may_not_read_or_write_is_one_line_that_names_it(
  place: pathlib.Path,
  open_folder: pathlib.Path,
  capfd: pytest.CaptureFixture,
  caplog: pytest.LogCaptureFixture,
  locked: str,
  mode: int,
  module: str,
  others: dict[str, str],
):
  for name in ("shards", "images", "run"):
    shutil.copytree(place / name, open_folder / name)
  (open_folder / "out").mkdir()
  defaults = {
    "tfrecords_tools.build": {"input_dir": "images", "output_dir": "new"},
    "tfrecords_tools.select": {"input_dirs": "shards"},
    "facedist.embed": {"workdir": "run", "input": "images"},
    "facedist.export": {"workdir": "run"},
    "facedist.evaluate": {"verification_data": "shards"},
    "facedist.doctor": {"data_dir": "shards", "backbone_weights": "none"},
  }.get(module, {})
  values = defaults | others
  if values.get("dataset") == "digits":
    del values["input_dir"]
  words = ("dataset", "backbone_weights")
  paths: dict[str, object] = {
    name: text if name in words or text == "1" else str(open_folder / text)
    for name, text in values.items()
  }
  os.chmod(open_folder / locked, mode)
  try:
    with ordinary_user():
      line = error_of(module, paths)
  finally:
    os.chmod(open_folder / locked, 0o755)
  assert "\n" not in line
  said = capfd.readouterr().out + caplog.text + line
  assert str(open_folder / locked) in said
  assert "permission denied" in said


class _Network:
  """Stands for a network; no case comes as far as its use."""

  name, image_size, embedding_size = "fake", SIZE, 2


def test_every_path_flag_of_every_command_is_in_the_sweep(
  monkeypatch: pytest.MonkeyPatch,
):
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "launch")
  swept = {(module, flag) for module, _, flags in SWEEP for flag in flags}
  # the trainer's flags are the doctor's, whose quick checks it begins with
  swept |= {("facedist.train", flag) for one, flag in swept if one == "facedist.doctor"}
  of_commands = {
    (module, field.name)
    for module in MODULES
    if not module.startswith("launch.")
    for field in flags_of_text(module)
    if kind_of(module, field) != "no path" and field.name not in ELSEWHERE
  }
  assert swept == of_commands
