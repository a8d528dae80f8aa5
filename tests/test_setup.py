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
  required = names(declared["install_requires"])
  extras = {name: names(these) for name, these in declared["extras_require"].items()}
  for_users = imported_distributions("facedist", "tfrecords_tools", "launch")
  assert for_users - required - extras["pytorch"] == set()
  for_developers = imported_distributions("benchmarks", "tests") - required
  assert for_developers - extras["dev"] - extras["fuzz"] - extras["pytorch"] == set()


def test_every_library_that_is_declared_is_imported(declared: dict[str, Any]):
  used = imported_distributions("facedist", "tfrecords_tools", "launch", "benchmarks")
  assert names(declared["install_requires"]) - used == set()


def test_what_is_installed_satisfies_what_is_declared(declared: dict[str, Any]):
  requirements = metadata.requires("facedist")
  assert requirements is not None
  installed = {text.split(";")[0].strip() for text in requirements}
  assert names(declared["install_requires"]) <= names(list(installed))
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
  assert "needs Python 3.11" in line
  assert "make PYTHON=/path/to/python3.11" in line


def test_make_with_another_python_says_so_in_one_line(make, tmp_path: pathlib.Path):
  fake_python(tmp_path, "python3", "exit 1")  # what sys.exit(version != 3.11) gives
  failed = make("test", path=str(tmp_path))
  (line,) = failed.stderr.splitlines()
  assert "needs Python 3.11" in line


def test_make_names_a_missing_venv_module_in_one_line(make, tmp_path: pathlib.Path):
  fake_python(tmp_path, "python3", 'case "$*" in *ensurepip*) exit 1;; esac')
  failed = make("test", path=str(tmp_path))
  (line,) = failed.stderr.splitlines()
  assert "apt-get install python3.11-venv" in line


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
