"""setup.py, the Makefile and .ci/run: what a fresh machine needs is declared."""

import ast
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest
import setuptools
from packaging import requirements

ROOT = pathlib.Path(__file__).parents[1]
OWN = ("facedist", "tfrecords_tools", "launch", "benchmarks", "tests", "setuptools")
# Distributions that share the namespace package google.
GOOGLE = {
  "google.api_core": "google-api-core",
  "google.auth": "google-auth",
  "google.cloud": "google-cloud-storage",
  "google.protobuf": "protobuf",
}


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
  """What setup.py hands to setuptools."""
  keywords: dict[str, Any] = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setuptools, "setup", lambda **given: keywords.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
  return keywords


def names(requirements: list[str]) -> set[str]:
  """Returns the distributions' names, without versions and extras."""
  return {re.split(r"[\[<>=!~ ]", text)[0] for text in requirements}


def imported_distributions(*folders: str) -> set[str]:
  """Returns the distributions that hold what these folders import anywhere."""
  modules: set[str] = set()
  for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        modules |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        modules |= {f"{node.module}.{alias.name}" for alias in node.names}
  distributions = metadata.packages_distributions()
  found = set()
  for module in modules:
    top = module.split(".")[0]
    if top in OWN or top in sys.stdlib_module_names or top in local_scripts():
      continue
    if top == "google":
      found.add(GOOGLE[".".join(module.split(".")[:2])])
    else:
      found |= set(distributions.get(top, [top]))  # an extra's need not be there
  return found


def local_scripts() -> set[str]:
  """Returns the modules that a script in launch/ or benchmarks/ finds beside it."""
  folders = ("launch", "benchmarks")
  return {path.stem for folder in folders for path in (ROOT / folder).glob("*.py")}


def test_every_library_that_is_imported_is_declared(declared: dict[str, Any]):
  required = {name.replace("-", "_") for name in names(declared["install_requires"])}
  required |= names(declared["install_requires"])  # a module that is not installed here
  extras = {name: names(these) for name, these in declared["extras_require"].items()}
  for_users = imported_distributions("facedist", "tfrecords_tools", "launch")
  optional = set().union(*(these for name, these in extras.items() if name != "dev"))
  assert for_users - required - optional == set()
  for_developers = imported_distributions("benchmarks", "tests") - required
  assert for_developers - optional - extras["dev"] == set()


def test_every_library_that_is_declared_is_imported(declared: dict[str, Any]):
  used = imported_distributions("facedist", "tfrecords_tools", "launch", "benchmarks")
  found = {name.replace("_", "-") for name in used}
  # tf-keras is imported by TensorFlow, which facedist/__init__.py asks to do so
  assert names(declared["install_requires"]) - found == {"tf-keras"}


def test_what_is_installed_satisfies_what_is_declared(declared: dict[str, Any]):
  recorded = metadata.requires("facedist")
  assert recorded is not None
  needed = map(requirements.Requirement, declared["install_requires"])
  here = {each.name for each in needed if not each.marker or each.marker.evaluate()}
  # chosen by hand, the lane is the other one of this Python
  lanes = {"tensorflow-addons", "tf-keras"}
  assert here - lanes <= names(recorded)
  check = [sys.executable, "-m", "pip", "check"]
  result = subprocess.run(check, check=False, capture_output=True, text=True)
  assert "facedist" not in result.stdout


def test_every_console_script_has_its_function(declared: dict[str, Any]):
  for script in declared["entry_points"]["console_scripts"]:
    name, module, function = re.split("[=:]", script)
    assert name.startswith("facedist-")
    path = ROOT / (module.replace(".", "/") + ".py")
    tree = ast.parse(path.read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function in functions, f"{path} has no {function}"


def test_the_packages_hold_every_module(declared: dict[str, Any]):
  packages = {
    ".".join(path.parent.relative_to(ROOT).parts)
    for folder in ("facedist", "tfrecords_tools")
    for path in (ROOT / folder).rglob("*.py")
  }
  assert set(declared["packages"]) == packages


def test_the_version_is_the_package_s():
  import facedist

  assert metadata.version("facedist") == facedist.__version__


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


def fake_python(folder: pathlib.Path, name: str, body: str) -> None:
  """Writes an executable that stands for an interpreter."""
  (folder / name).write_text(f"#!/bin/sh\n{body}\n")
  (folder / name).chmod(0o755)


@pytest.mark.parametrize("target", ["setup", "test", "demo", "bench", "lint"])
def test_make_without_a_python_says_so_in_one_line(make, target: str):
  failed = make(target)
  assert failed.returncode != 0
  assert failed.stdout == ""
  (line,) = failed.stderr.splitlines()
  assert "needs Python 3.11 or 3.12 or 3.13 and found none" in line
  assert "make PYTHON=/path/to/python3.11" in line


def test_make_with_another_python_says_so_in_one_line(make, tmp_path: pathlib.Path):
  fake_python(tmp_path, "python3", say_version("3.10"))
  failed = make("test", path=str(tmp_path))
  (line,) = failed.stderr.splitlines()
  assert "needs Python 3.11" in line


def test_make_names_a_missing_venv_module_in_one_line(make, tmp_path: pathlib.Path):
  fake_python(tmp_path, "python3", 'case "$*" in *ensurepip*) exit 1;; esac')
  failed = make("test", path=str(tmp_path))
  (line,) = failed.stderr.splitlines()
  assert "apt-get install python3-venv" in line


@pytest.mark.parametrize(
  ("version", "wanted", "lane"),
  [
    ("3.11", "", "2.15"),
    ("3.12", "", "2.21"),
    ("3.13", "", "2.21"),
    ("3.11", "2.21", "2.21"),
    ("3.11", "2.15", "2.15"),
  ],
)
def test_make_takes_the_lane_of_the_python_and_says_which(
  make, tmp_path: pathlib.Path, version: str, wanted: str, lane: str
):
  fake_python(tmp_path, "python3", say_version(version))
  failed = make("setup", f"TENSORFLOW={wanted}", path=str(tmp_path))
  (line,) = failed.stdout.splitlines()
  assert f"with python3 and TensorFlow {lane};" in line
  assert failed.returncode == 2  # the fake makes no virtual environment


def test_make_keeps_the_lane_of_the_virtual_environment(make, tmp_path: pathlib.Path):
  (tmp_path / "venv").mkdir()
  (tmp_path / "venv/.tensorflow").write_text("2.21\n")
  fake_python(tmp_path, "python3", say_version("3.11"))
  failed = make("test", path=str(tmp_path))
  assert "TensorFlow 2.21;" in failed.stdout


@pytest.mark.parametrize(
  ("lane", "line"),
  [
    ("2.15", "facedist needs Python 3.11 and found none"),
    ("2.18", "TENSORFLOW=2.18 must be 2.15 or 2.21"),
  ],
)
def test_make_refuses_a_lane_that_cannot_be_in_one_line(
  make, tmp_path: pathlib.Path, lane: str, line: str
):
  fake_python(tmp_path, "python3", say_version("3.13"))
  failed = make("setup", f"TENSORFLOW={lane}", path=str(tmp_path))
  (said,) = failed.stderr.splitlines()
  assert line in said


@pytest.mark.parametrize(
  ("chosen", "old", "new"),
  [("", True, True), ("2.15", True, False), ("2.21", False, True)],
)
def test_each_lane_has_its_tensorflow_and_a_constraint_file_that_fits(
  chosen: str, old: bool, new: bool, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setenv("FACEDIST_TENSORFLOW", chosen)
  keywords: dict[str, Any] = {}
  monkeypatch.setattr(setuptools, "setup", lambda **given: keywords.update(given))
  runpy.run_path(str(ROOT / "setup.py"))
  found = [requirements.Requirement(text) for text in keywords["install_requires"]]
  versions = [each for each in found if each.name == "tensorflow"]
  assert ["2.15.1" in each.specifier for each in versions] == [True] * old + [
    False
  ] * new
  for lane, python in (("2.15", "3.11"), ("2.21", "3.11"), ("2.21", "3.13")):
    if chosen != lane and (chosen or (lane == "2.15") != (python == "3.11")):
      continue
    pins = constraints(lane, python)
    for each in (
      *found,
      *map(requirements.Requirement, keywords["extras_require"]["dev"]),
    ):
      if each.marker is None or each.marker.evaluate({"python_version": python}):
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
