"""Every path flag of every command with paths that lead nowhere: always one line."""

import contextlib
import importlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping

import cv2
import numpy as np
import pytest

from facedist import errors, storage
from tests import noise_sets
from tests.test_paths_of_flags import MODULES, config_class, flags_of_text, kind_of

RECORDED = pathlib.Path(__file__).parent / "facedist" / "recorded"
SIZE = 28  # of the recorded network
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
KINDS = {  # those that are bad for a flag
  "input": set(BAD),
  "file": set(BAD) - {"a file", "a device"},  # the device is an empty list
  "new file": set(BAD) - {"a file", "missing"},
  "new folder": set(BAD) - {"a folder", "missing"},
}

EVALUATE = "workdir=run verification_data=shards"
VGGFACE2 = "dataset=vggface2 input_dir=images output_dir=new"
# command, further flags, and the path flags of each kind
SWEEP: tuple[tuple[str, str, dict[str, str]], ...] = (
  (
    "tfrecords_tools.build",
    VGGFACE2,
    {
      "new folder": "output_dir scratch_dir",
      "input": "input_dir input_list image_list landmarks bounding_boxes",
      "file": "lfw_names identities exclude_identities identity_meta",
    },
  ),
  *(
    ("tfrecords_tools.build", f"dataset={dataset} output_dir=new", {"input": flag})
    for dataset, flag in {
      "lfw input_dir=images": "pairs",
      "pairs input_dir=images": "pairs",
      "bin": "input_dir",
      "rec": "input_dir",
      "webdataset": "input_dir",
      "npz": "input_dir",
    }.items()
  ),
  (
    "tfrecords_tools.align",
    "input_dir=images output_dir=new",
    {
      "new folder": "output_dir scratch_dir",
      "input": "input_dir input_list compare_with yunet",
    },
  ),
  (
    "tfrecords_tools.verify",
    "data_dir=shards",
    {"input": "data_dir", "new file": "report"},
  ),
  ("tfrecords_tools.rebuild_index", "", {"input": "data_dir"}),
  (
    "tfrecords_tools.inspect",
    "data_dir=shards",
    {"input": "data_dir diff", "new file": "report", "new folder": "pictures"},
  ),
  (
    "tfrecords_tools.inspect",
    "data_dir=shards diff=shards",
    {"new folder": "scratch_dir"},
  ),
  (
    "tfrecords_tools.find_overlap",
    "embeddings=embeddings.json others=embeddings.json",
    {
      "input": "embeddings others lfw_names",
      "new file": "report write_excluded",
      "file": "identity_meta",
    },
  ),
  (
    "tfrecords_tools.select",
    "input_dirs=shards output_dir=new",
    {
      "input": "input_dirs",
      "new folder": "output_dir",
      "file": "identities exclude_identities relabel",
    },
  ),
  ("tfrecords_tools.synthetic_faces", "", {"new folder": "output_dir"}),
  (
    "facedist.doctor",
    "data_dir=shards workdir=new backbone_weights=none",
    {"input": "data_dir backbone_weights", "new folder": "workdir"},
  ),
  (
    "facedist.embed",
    "workdir=run input=images output=new.json",
    # a plot's name ends in .png
    {"input": "workdir checkpoint input plot yunet", "new file": "output"},
  ),
  (
    "facedist.identify",
    "embeddings=labelled.json",
    {"input": "embeddings gallery groups"},
  ),
  (
    "facedist.search",
    "gallery=labelled.json query=labelled.json",
    {"input": "gallery query"},
  ),
  (
    "facedist.templates",
    "protocol=tinyface data=tiny embeddings=tiny.json workdir=run output=new.json",
    # the embeddings' name ends in .npz
    {"input": "data embeddings workdir checkpoint", "new file": "output"},
  ),
  (
    "facedist.compare",
    "workdir=run first=images/n1/1.jpg second=images/n2/1.jpg",
    {"input": "first second workdir checkpoint"},
  ),
  (
    "facedist.compare",
    "workdir=run first=photo.jpg second=photo.jpg",
    {"input": "yunet"},
  ),
  ("facedist.report", "workdir=run", {"input": "workdir", "new file": "output"}),
  (
    "facedist.export",
    "workdir=run output=new",
    {"input": "workdir checkpoint verification_data", "new folder": "output"},
  ),
  (
    "facedist.export",
    "workdir=run output=new.tflite precision=int8",
    {"input": "calibration"},
  ),
  (
    "facedist.evaluate",
    EVALUATE,
    {"input": "workdir checkpoint verification_data groups"},
  ),
)
# flags whose values are no paths here
WORDS = {"backbone_weights", "checkpoint", "dataset", "precision", "protocol"}
OUTPUTS = {"output", "output_dir", "pictures", "report", "write_excluded"}
ELSEWHERE = {
  "cache_dir",  # of a bucket's shards alone: tests/facedist/data/test_shard_cache.py
  "heartbeat_file",  # tests/facedist/training/test_guard.py
}
# of commands, so that they try no more than the paths
OWN_FLAGS: dict[str, dict[str, object]] = {
  "facedist.compare": {"threshold": 0.5},
  "facedist.doctor": {"quick": True, "strategy": "one"},
  "tfrecords_tools.synthetic_faces": {
    "num_identities": 1,
    "images_per_identity": 1,
    "num_processes": 1,
  },
}


def cases() -> list[tuple[str, str, str, str]]:
  """Returns command, further flags, the path flag and what is bad about its path."""
  return [
    (module, others, flag, bad)
    for module, others, flags in SWEEP
    for kind, names in flags.items()
    for flag in names.split()
    for bad in sorted(KINDS[kind])
  ]


def paths_in(
  folder: pathlib.Path, words: str, *, new: pathlib.Path | None = None
) -> dict[str, str]:
  """Returns the flags of these words; paths lie in the folder, new ones in `new`."""
  values = dict(word.split("=") for word in words.split())
  for name, text in values.items():
    if name not in WORDS:
      is_new = new is not None and text.startswith("new")
      values[name] = str((new if is_new else folder) / text)
  return values


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with what the commands need, and with what they cannot use."""
  folder = tmp_path_factory.mktemp("paths")
  noise_sets.write(folder / "shards", identities=2, images=2, size=32)
  tiny = ("Probe/1_1", "Gallery_Match/1_2", "Gallery_Distractor/a")
  for name in ("images/n1/1", "images/n2/1", *(f"tiny/{name}" for name in tiny)):
    path = folder / f"{name}.jpg"
    path.parent.mkdir(parents=True)
    assert cv2.imwrite(str(path), np.zeros((SIZE, SIZE, 3), np.uint8))
  assert cv2.imwrite(str(folder / "photo.jpg"), np.zeros((40, 40, 3), np.uint8))
  (folder / "file").write_bytes(b"\x00\xff no face, \x80 no text\n")
  (folder / "folder" / "nothing").mkdir(parents=True)
  (folder / "circle").symlink_to(folder / "circle")
  (folder / "embeddings.json").write_text("{\n}\n")
  write_embeddings(folder / "labelled.json", {"n1/1": "n1", "n1/2": "n1", "n2/1": "n2"})
  write_embeddings(folder / "tiny.json", dict.fromkeys(tiny))
  shutil.copytree(RECORDED / "run", folder / "run")
  return folder


def write_embeddings(path: pathlib.Path, identities: Mapping[str, str | None]) -> None:
  """Writes the file that facedist.embed would, with one embedding for all."""
  lines = ",\n".join(
    json.dumps({"path": f"{name}.jpg", "identity": identity, "embedding": [1, 0]})
    for name, identity in identities.items()
  )
  path.write_text(f'{{\n"embeddings": [\n{lines}\n],\n"skipped": []\n}}\n')


def error_of(module_name: str, values: dict[str, str]) -> str:
  """Runs a command in this process; returns the line that it ends with."""
  module = importlib.import_module(module_name)
  own = OWN_FLAGS.get(module_name, {})
  if module_name == "facedist.evaluate" and "checkpoint" not in values:
    own = {"once": True}
  if module_name == "facedist.embed":
    own = {"align": "yunet" in values}
  error: errors.FacedistError | None = None
  code = 0
  try:
    code = module.main(config_class(module_name)(**values, **own))
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
  ids=lambda value: "" if "=" in value else value,
)
def test_a_bad_path_is_one_line_and_nothing_is_left_behind(
  place: pathlib.Path,
  tmp_path: pathlib.Path,
  module: str,
  others: str,
  flag: str,
  bad: str,
):
  values = paths_in(place, others, new=tmp_path)
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
  ("locked", "mode", "module", "words"),
  [
    ("images/n1", 0, "tfrecords_tools.build", VGGFACE2),
    ("images", 0, "tfrecords_tools.build", VGGFACE2),
    ("shards/manifest.json", 0, "tfrecords_tools.verify", "data_dir=shards"),
    ("shards", 0, "tfrecords_tools.verify", "data_dir=shards"),
    ("shards", 0, "tfrecords_tools.rebuild_index", "data_dir=shards"),
    ("shards", 0, "facedist.evaluate", f"{EVALUATE} checkpoint=4"),
    ("run", 0o555, "facedist.evaluate", EVALUATE),
    ("run/config.json", 0, "facedist.doctor", "data_dir=shards workdir=run"),
    ("run", 0o555, "facedist.doctor", "data_dir=shards workdir=run"),
    ("out", 0o555, "facedist.embed", "workdir=run input=images output=out/new.json"),
    ("out", 0o555, "facedist.export", "workdir=run output=out/new"),
    ("out", 0o555, "tfrecords_tools.build", "dataset=digits output_dir=out"),
    ("out", 0o555, "tfrecords_tools.select", "input_dirs=shards output_dir=out/new"),
    ("out", 0o555, "tfrecords_tools.synthetic_faces", "output_dir=out/new"),
    ("out", 0o555, "tfrecords_tools.inspect", "data_dir=shards report=out/new"),
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
  words: str,
):
  for name in ("shards", "images", "run"):
    shutil.copytree(place / name, open_folder / name)
  (open_folder / "out").mkdir()
  os.chmod(open_folder / locked, mode)
  try:
    with ordinary_user():
      line = error_of(module, paths_in(open_folder, words))
  finally:
    os.chmod(open_folder / locked, 0o755)
  assert "\n" not in line
  said = capfd.readouterr().out + caplog.text + line
  assert str(open_folder / locked) in said
  assert "permission denied" in said


def test_every_path_flag_of_every_command_is_in_the_sweep(
  monkeypatch: pytest.MonkeyPatch,
):
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "launch")
  swept = {(module, flag) for module, _, flag, _ in cases()}
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
