"""setup.py, the Makefile and .ci/run: what a fresh machine needs is declared."""

import collections
import os
import pathlib
import re
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
from packaging import requirements

from tests.test_layers import imports_of, sources
from tests.test_paths_of_flags import MODULES

ROOT = pathlib.Path(__file__).parents[1]
OWN = {"facedist", "tfrecords_tools", "launch", "benchmarks", "tests", "setuptools"}
# Distributions that share the namespace package google.
GOOGLE = {
  "google.api_core": "google-api-core",
  "google.auth": "google-auth",
  "google.cloud": "google-cloud-storage",
  "google.protobuf": "protobuf",
}


def metadata_made_in(folder: pathlib.Path) -> metadata.Distribution:
  """Returns what setuptools makes of setup.py."""
  command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={folder}"]
  subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
  return metadata.Distribution.at(folder / "facedist.egg-info")


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> metadata.Distribution:
  return metadata_made_in(tmp_path_factory.mktemp("declared"))


def by_extra(
  declared: metadata.Distribution,
) -> dict[str, list[requirements.Requirement]]:
  """Returns what each extra brings, and under "" what every installation has."""
  found: dict[str, list[requirements.Requirement]] = collections.defaultdict(list)
  for each in map(requirements.Requirement, declared.requires or []):
    extra = re.search(r'extra == "(\w+)"', str(each.marker))
    found[extra[1] if extra else ""].append(each)
  return found


def names(found: list[requirements.Requirement]) -> set[str]:
  return {each.name for each in found}


def imported_distributions(*folders: str) -> set[str]:
  """Returns the distributions that hold what these folders import anywhere."""
  scripts = {path.stem for path in sources("launch", "benchmarks")}  # lie side by side
  distributions = metadata.packages_distributions()
  found = set()
  for name in {one.name for path in sources(*folders) for one in imports_of(path)}:
    top = name.split(".")[0]
    if top in sys.stdlib_module_names | scripts | OWN:
      continue
    if top == "google":
      found.add(GOOGLE[".".join(name.split(".")[:2])])
    else:
      found |= set(distributions.get(top, [top]))  # an extra's need not be there
  return found


def test_every_library_that_is_imported_is_declared(declared: metadata.Distribution):
  groups = {extra: names(found) for extra, found in by_extra(declared).items()}
  developers = groups.pop("dev")
  known = set().union(*groups.values())
  known |= {name.replace("-", "_") for name in known}  # modules not installed here
  assert imported_distributions("facedist", "tfrecords_tools", "launch") <= known
  assert imported_distributions("benchmarks", "tests") <= known | developers


def test_every_library_that_is_declared_is_imported(declared: metadata.Distribution):
  used = imported_distributions("facedist", "tfrecords_tools", "launch", "benchmarks")
  found = {name.replace("_", "-") for name in used}
  # tf-keras is imported by TensorFlow, which facedist/__init__.py asks to do so
  assert names(by_extra(declared)[""]) - found == {"tf-keras"}


def test_what_is_installed_satisfies_what_is_declared(declared: metadata.Distribution):
  needed = by_extra(declared)[""]
  here = {one.name for one in needed if not one.marker or one.marker.evaluate()}
  # chosen by hand, the lane is the other one of this Python
  lanes = {"tensorflow-addons", "tf-keras"}
  installed = metadata.distribution("facedist")
  assert here - lanes <= names(by_extra(installed)[""])
  assert installed.version == declared.version
  check = [sys.executable, "-m", "pip", "check"]
  result = subprocess.run(check, check=False, capture_output=True, text=True)
  assert "facedist" not in result.stdout


def test_every_console_script_runs_a_command(declared: metadata.Distribution):
  for script in declared.entry_points.select(group="console_scripts"):
    assert script.name.startswith("facedist-")
    assert (script.module in MODULES, script.attr) == (True, "run")


def test_the_packages_hold_every_module(declared: metadata.Distribution):
  held = set((declared.read_text("SOURCES.txt") or "").splitlines())
  for folder in ("facedist", "tfrecords_tools"):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
    assert modules <= held


def test_the_extra_of_a_gpu_brings_its_libraries(declared: metadata.Distribution):
  found = by_extra(declared)["gpu"]
  assert {(each.name, *each.extras) for each in found} == {("tensorflow", "and-cuda")}


@pytest.fixture
def make(tmp_path: pathlib.Path):
  """Runs make in the repository with nothing but the given folders on the PATH."""
  program = shutil.which("make")
  if program is None:
    pytest.skip("make is not installed")

  def run_make(*arguments: str, path: str = "/nonexistent"):
    return subprocess.run(
      [program, f"VENV={tmp_path / 'venv'}", *arguments],
      cwd=ROOT,
      env={"PATH": path},
      check=False,
      capture_output=True,
      text=True,
    )

  return run_make


def say_version(major_minor: str) -> str:
  """A shell's body that answers what the Makefile asks of a Python of this version."""
  is_3_11 = "exit 0" if major_minor == "3.11" else "exit 1"
  return (
    'case "$*" in\n'
    f'  *"(3, 11)"*) {is_3_11};;\n'
    f'  *version_info*) case "$*" in *{major_minor}*) exit 0;; *) exit 1;; esac;;\n'
    '  *"-m venv"*) exit 9;;\n'
    "esac"
  )


def fake_python(folder: pathlib.Path, body: str) -> None:
  """Writes an executable that stands for an interpreter."""
  (folder / "python3").write_text(f"#!/bin/sh\n{body}\n")
  (folder / "python3").chmod(0o755)


@pytest.mark.parametrize(
  ("words", "python", "says"),
  [
    *(
      (target, None, "make PYTHON=/path/to/python3.11")
      for target in ("setup", "test", "demo", "lint")
    ),
    ("test", say_version("3.10"), "needs Python 3.11 or 3.12 or 3.13 and found none"),
    ("test", 'case "$*" in *ensurepip*) exit 1;; esac', "install python3-venv"),
    ("setup TENSORFLOW=2.15", say_version("3.13"), "needs Python 3.11 and found none"),
    ("setup TENSORFLOW=2.18", say_version("3.13"), "=2.18 must be 2.15 or 2.21"),
  ],
)
def test_make_without_a_python_that_serves_says_so_in_one_line(
  make, tmp_path: pathlib.Path, words: str, python: str | None, says: str
):
  if python is not None:
    fake_python(tmp_path, python)
  failed = make(*words.split(), path=str(tmp_path))
  assert (failed.returncode, failed.stdout) == (2, "")
  (line,) = failed.stderr.splitlines()
  assert says in line


@pytest.mark.parametrize(
  ("version", "words", "lane"),
  [
    ("3.11", "setup", "2.15"),
    ("3.12", "setup", "2.21"),
    ("3.13", "setup", "2.21"),
    ("3.11", "setup TENSORFLOW=2.21", "2.21"),
    ("3.11", "setup TENSORFLOW=2.15", "2.15"),
    ("3.11", "test", "2.21"),  # that of the virtual environment
  ],
)
def test_make_takes_the_lane_of_the_python_and_says_which(
  make, tmp_path: pathlib.Path, version: str, words: str, lane: str
):
  if words == "test":
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/.tensorflow").write_text("2.21\n")
  fake_python(tmp_path, say_version(version))
  failed = make(*words.split(), path=str(tmp_path))
  (line,) = failed.stdout.splitlines()
  assert f"with python3 and TensorFlow {lane};" in line
  assert failed.returncode == 2  # the fake makes no virtual environment


@pytest.mark.parametrize(
  ("chosen", "is_old", "pythons"),
  [
    ("", [True, False], {"2.15": ["3.11"], "2.21": ["3.13"]}),
    ("2.15", [True], {"2.15": ["3.11"]}),
    ("2.21", [False], {"2.21": ["3.11", "3.13"]}),
  ],
)
def test_each_lane_has_its_tensorflow_and_a_constraint_file_that_fits(
  chosen: str,
  is_old: list[bool],
  pythons: dict[str, list[str]],
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
):
  monkeypatch.setenv("FACEDIST_TENSORFLOW", chosen)
  groups = by_extra(metadata_made_in(tmp_path))
  versions = [each for each in groups[""] if each.name == "tensorflow"]
  assert ["2.15.1" in each.specifier for each in versions] == is_old
  for lane, python in ((lane, one) for lane, some in pythons.items() for one in some):
    pins = constraints(lane, python)
    for each in (*groups[""], *groups["dev"]):
      here = {"python_version": python, "extra": "dev"}
      if each.marker is None or each.marker.evaluate(here):
        assert pins[each.name.lower()] in each.specifier, each


def constraints(lane: str, python: str) -> dict[str, str]:
  """Returns the version that a lane's constraint file has for each distribution."""
  pins = {}
  for line in (ROOT / f"requirements/tensorflow-{lane}.txt").read_text().splitlines():
    if line.startswith("#"):
      continue
    each = requirements.Requirement(line)
    if each.marker is None or each.marker.evaluate({"python_version": python}):
      pins[each.name.lower().replace("_", "-")] = str(each.specifier)[2:]
  return pins


def test_make_alone_lists_the_targets(make):
  listed = make(path=os.environ["PATH"])
  assert listed.returncode == 0
  shown = re.findall(r"^  ([\w-]+)\t\S", listed.stdout, re.M)
  targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
  assert targets is not None
  assert shown == targets[1].split()


def test_the_ci_script_is_executable_and_parses():
  script = ROOT / ".ci" / "run"
  assert os.access(script, os.X_OK)
  subprocess.run(["bash", "-n", str(script)], check=True)
