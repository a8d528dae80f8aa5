"""What the documentation says of exit codes, flags and files is so."""

import dataclasses
import pathlib
import re

import pytest

from facedist import config, errors
from facedist.models.heads.margins import MARGINS
from facedist.training import config as train_config
from tests.test_paths_of_flags import MODULES, config_class

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def test_the_table_of_exit_codes_is_that_of_the_code():
  text = (ROOT / "docs/architecture.md").read_text()
  rows = re.findall(r"^\| (\d+) \| .* \| (yes|no) \|$", text, re.MULTILINE)
  documented = {int(code): restart == "yes" for code, restart in rows}
  assert documented == {int(code): code >= 128 for code in errors.ExitCode}


# flags of absl, sbatch, docker, tensorboard and others that the pages show
OTHERS = {
  "array", "copies", "cpus", "dependency", "distribution", "exclude", "explain",
  "export", "flagfile", "for", "help", "kustomize", "logdir", "manifest",
  "max_restarts", "nodes", "ntasks", "oneliner", "output", "overwrite", "parsable",
  "requeue", "rounds", "signal", "tag", "time", "timeout", "wait", "workers",
}  # fmt: skip
SHOWING_FLAGS = (
  *(ROOT / name for name in ("README.md", "docs/data.md", "docs/launch.md")),
  *sorted((ROOT / "launch" / "slurm").iterdir()),
)


@pytest.mark.parametrize("page", SHOWING_FLAGS, ids=lambda page: page.name)
def test_every_flag_that_is_shown_exists(page: pathlib.Path):
  known = OTHERS | names_of_flags(config.CommonConfig)
  for module in MODULES:
    if not module.startswith("launch."):
      known |= names_of_flags(config_class(module))
  named = re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)", page.read_text())
  assert named
  assert {name for name in named if "-" not in name} <= known  # ours have no dash


def names_of_flags(kind: type) -> set[str]:
  return {field.name for field in dataclasses.fields(kind)}


def test_the_table_of_optimizers_shows_the_defaults_of_each():
  text = (ROOT / "docs/optimisers.md").read_text()
  rows = re.findall(r"^\| `(\w+)`[^|]*\|[^|]*\|([^|]*)\|", text, re.MULTILINE)
  defaults = {
    optimizer: {name: value for name, value in numbers.items() if name != "head_rate"}
    for optimizer, numbers in train_config.DEFAULTS.items()
  }
  shown = {
    optimizer: {
      name: float(value) for name, value in re.findall(r"--(\w+)=([-\de.]+)", numbers)
    }
    for optimizer, numbers in rows
  }
  assert shown == defaults


def test_the_table_of_heads_shows_each_with_its_defaults():
  text = (ROOT / "docs/losses.md").read_text()
  rows = re.findall(r"^\| `(\w+)`[^|]*\|[^|]*\|([^|]*)\|", text, re.MULTILINE)
  assert {head for head, _ in rows} == set(MARGINS)
  for head, defaults in rows:
    shown = {
      flag: float(value) for flag, value in re.findall(r"--(\w+)=([\d.]+)", defaults)
    }
    sub_centres = shown.pop("sub_centres", 1)
    assert shown == MARGINS[head].defaults()
    assert sub_centres == MARGINS[head].default_sub_centres


@pytest.mark.parametrize(
  "tool", ["align", "build", "select", "verify", "inspect", "find_overlap"]
)
def test_the_data_pages_commands_have_the_flags_they_are_shown_with(tool: str):
  text = (ROOT / "docs/data.md").read_text().replace("\\\n", " ")
  module = f"tfrecords_tools.{tool}"
  commands = re.findall(rf"^python -m {module} (.*)$", text, re.MULTILINE)
  assert commands
  shown = set(re.findall(r"--([a-z][a-z0-9_]*)", " ".join(commands)))
  assert shown <= names_of_flags(config_class(module))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_to_files(page: pathlib.Path):
  for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
    assert (page.parent / target).exists(), target


def test_every_file_that_architecture_names_in_a_room_is_there():
  text = (ROOT / "docs/architecture.md").read_text()
  named = re.findall(r"`((?:data|models|evaluation|training)/\w+\.py)`", text)
  assert named
  assert [name for name in named if not (ROOT / "facedist" / name).exists()] == []
