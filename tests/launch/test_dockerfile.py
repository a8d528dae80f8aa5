"""Dockerfile: the image has what the commands need. None is built here."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
COMMANDS = ("facedist.train", "facedist.evaluate", "tfrecords_tools.build")


def copies() -> list[tuple[list[str], str]]:
  """Returns sources and target of every COPY, in order."""
  lines = [line.split() for line in TEXT.splitlines() if line.startswith("COPY ")]
  return [(words[1:-1], words[-1]) for words in lines]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The folder that the image's working directory will be, as COPY makes it."""
  folder = tmp_path_factory.mktemp("image")
  kept = (ROOT / ".dockerignore").read_text().splitlines()
  for sources, target in copies():
    for source in sources:
      assert "!" + source.split("/")[0] in kept, f"{source} is not sent to the builder"
      path = ROOT / source
      into_folder = target.endswith("/")
      place = folder / target / (path.name if into_folder else "")
      place.parent.mkdir(parents=True, exist_ok=True)
      if path.is_dir():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, place, dirs_exist_ok=True, ignore=ignored)
      else:
        shutil.copy(path, place)
  return folder


def test_the_manifests_commands_run_on_what_is_copied(image: pathlib.Path):
  program = f"""
import importlib, sys
sys.path[0] = {str(image)!r}  # as with python -m there
for name in {COMMANDS}:
  print(importlib.import_module(name).__file__)
"""
  result = subprocess.run(
    [sys.executable, "-c", program],
    cwd=image,
    env={"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  assert result.returncode == 0, result.stderr
  files = [pathlib.Path(line) for line in result.stdout.splitlines()]
  assert files == [image / f"{name.replace('.', '/')}.py" for name in COMMANDS]


def test_the_flagfile_of_the_manifests_is_in_the_image(image: pathlib.Path):
  settings = ROOT / "launch/kubernetes/common/settings.yaml"
  flagfile = yaml.safe_load(settings.read_text())["data"]["FLAGFILE"]
  assert (image / flagfile).is_file()


def test_each_lane_has_a_python_that_it_runs_on_and_its_constraint_file():
  stages = re.findall(r"^FROM python:([\d.]+)-\S+ AS tensorflow-([\d.]+)$", TEXT, re.M)
  assert dict(stages) == {"3.11": "2.15", "3.13": "2.21"}
  for _, lane in stages:
    assert (ROOT / f"requirements/tensorflow-{lane}.txt").is_file()
  assert re.search(r"^FROM tensorflow-\$\{TENSORFLOW\}$", TEXT, re.M)
  assert 'FACEDIST_TENSORFLOW="$TENSORFLOW" pip install' in TEXT
  assert '--constraint "requirements/tensorflow-$TENSORFLOW.txt"' in TEXT


@pytest.mark.parametrize(
  ("variant", "code", "extra"),
  [("cpu", 0, ""), ("gpu", 0, "[gpu]"), ("tpu", 1, "")],  # tests/test_setup.py has gpu
)
def test_a_variant_installs_its_extra_and_an_unknown_one_ends_the_build(
  variant: str, code: int, extra: str
):
  script = re.search(r'^RUN (case "\$VARIANT" .*?esac)', TEXT, re.M | re.S)
  assert script is not None
  lines = (
    f"VARIANT={variant}\n{script[1].replace(chr(92) + chr(10), ' ')}\necho $extras"
  )
  result = subprocess.run(["sh", "-c", lines], check=False, stdout=subprocess.PIPE)
  assert (result.returncode, result.stdout.decode().strip()) == (code, extra)
  assert '--editable ".$extras"' in TEXT
  assert re.search(r"^ARG VARIANT=cpu$", TEXT, re.M)


def test_a_change_of_the_code_leaves_the_layer_with_the_libraries():
  install = TEXT.index("pip install")
  before = {name for sources, _ in copies() for name in sources}
  before = {name for name in before if TEXT.index(f" {name} ") < install}
  assert before == {
    *("setup.py", "pyproject.toml", "README.md", "requirements"),
    *("facedist/__init__.py", "tfrecords_tools/__init__.py"),
  }
  assert "rm -rf /var/lib/apt/lists/*" in TEXT


def test_the_image_runs_without_root_behind_an_init():
  assert re.search(r"^USER 1000:1000$", TEXT, re.M)
  assert re.search(r'^ENTRYPOINT \["tini", "--"\]$', TEXT, re.M)
