"""What the documentation says of exit codes, flags and files is so."""

import dataclasses
import pathlib
import re

import pytest

from facedist import (
  compare,
  config,
  embed,
  errors,
  evaluate,
  export,
  identify,
  report,
  search,
  templates,
)
from facedist.models.heads.margins import MARGINS
from facedist.training import config as train_config
from facedist.training.config import TrainConfig
from tfrecords_tools import align, find_overlap, inspect, select, verify
from tfrecords_tools.builder import options

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def test_the_table_of_exit_codes_is_that_of_the_code():
  text = (ROOT / "docs/architecture.md").read_text()
  rows = re.findall(r"^\| (\d+) \| .* \| (yes|no) \|$", text, re.MULTILINE)
  documented = {int(code): restart == "yes" for code, restart in rows}
  assert documented == {int(code): code >= 128 for code in errors.ExitCode}


def test_the_flags_in_the_readme_exist():
  known = {
    "help",
    "flagfile",
    "workers",
    "max_restarts",
    "logdir",
    "explain",  # takes words, not a value
  }  # absl's, launch/local.py's, others'
  for settings in (
    TrainConfig,
    evaluate.EvaluateConfig,
    identify.IdentifyConfig,
    compare.CompareConfig,
    search.SearchConfig,
    report.ReportConfig,
    templates.TemplatesConfig,
    embed.EmbedConfig,
    export.ExportConfig,
    options.BuildConfig,
    config.CommonConfig,
  ):
    known |= {field.name for field in dataclasses.fields(settings)}
  named = re.findall(r"--([a-z][a-z0-9_]*)", (ROOT / "README.md").read_text())
  assert named
  assert set(named) <= known


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


TOOLS = {
  "align": align.AlignConfig,
  "build": options.BuildConfig,
  "select": select.SelectConfig,
  "verify": verify.VerifyConfig,
  "inspect": inspect.InspectConfig,
  "find_overlap": find_overlap.OverlapConfig,
}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_data_pages_commands_have_the_flags_they_are_shown_with(tool: str):
  text = (ROOT / "docs/data.md").read_text().replace("\\\n", " ")
  commands = re.findall(
    rf"^python -m tfrecords_tools\.{tool} (.*)$", text, re.MULTILINE
  )
  assert commands
  known = {field.name for field in dataclasses.fields(TOOLS[tool])}
  assert set(re.findall(r"--([a-z][a-z0-9_]*)", " ".join(commands))) <= known


def test_every_flag_on_the_data_page_is_one_of_some_command():
  text = (ROOT / "docs/data.md").read_text()
  others = (
    "help",
    "copies",
    "rounds",
    "overwrite",
    "manifest",
    "parsable",
    "array",
    "cpus",
    "dependency",
  )
  known = set(others)  # the benchmark's, tfrecords_tools.index's and sbatch's
  for settings in (TrainConfig, config.CommonConfig, *TOOLS.values()):
    known |= {field.name for field in dataclasses.fields(settings)}
  assert set(re.findall(r"--([a-z][a-z0-9_]*)", text)) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_to_files(page: pathlib.Path):
  for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
    assert (page.parent / target).exists(), target


def test_every_file_that_architecture_names_in_a_room_is_there():
  text = (ROOT / "docs/architecture.md").read_text()
  named = re.findall(r"`((?:data|models|evaluation|training)/\w+\.py)`", text)
  assert named
  assert [name for name in named if not (ROOT / "facedist" / name).exists()] == []
