"""docs/operations.md has every message of a run that goes wrong, and every finding."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs/operations.md").read_text()
PEERS = sorted((ROOT / "facedist/peers").glob("*.py"))
STRATEGIES = sorted((ROOT / "facedist/strategies").glob("*.py"))
PREFLIGHT = sorted((ROOT / "facedist/preflight").glob("*.py"))
TRAINING = [
  ROOT / "facedist/training" / f"{name}.py"
  for name in (
    *("checkpoints", "course", "damage_limit", "guard", "interruption", "logs"),
    "outbox",
    *("restoring", "row_files", "row_store", "run_folder", "saving", "trainer"),
  )
]
SPEAKS = re.compile(r"Error$|Verdict$|_say$|logging\.(error|warning)$")
FEWEST_WORDS = 3


def pieces(node: ast.expr) -> list[str]:
  """Returns what is fixed of a text, in pieces of some words."""
  parts = node.values if isinstance(node, ast.JoinedStr) else [node]
  texts = [part.value for part in parts if isinstance(part, ast.Constant)]
  found = [
    " ".join(piece.split()).strip(" .,:()")
    for text in texts
    if isinstance(text, str)
    for piece in re.split(r"%\w|[;,:] ", text)
  ]
  return [piece for piece in found if len(piece.split()) >= FEWEST_WORDS]


def messages(path: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
  """Yields where a module says something to its user, and what is fixed of it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call) and node.args:
      first = node.args[0]
      if SPEAKS.search(ast.unparse(node.func)) and (found := pieces(first)):
        yield f"{path.name}, line {node.lineno}", found


def texts(path: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
  """Yields every text with something to fill in, such as the parts of a verdict."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.JoinedStr) and (found := pieces(node)):
      yield f"{path.name}, line {node.lineno}", found


@pytest.mark.parametrize(
  "path", [*PEERS, *TRAINING, *STRATEGIES], ids=lambda one: one.stem
)
def test_the_page_shows_every_message_of_a_run_that_goes_wrong(path: pathlib.Path):
  page = " ".join(PAGE.split())
  said = [*messages(path), *(texts(path) if path in PEERS else [])]
  assert not [(where, what) for where, what in said if not any(s in page for s in what)]


def test_messages_are_found_where_they_are():
  assert len([one for path in (*PEERS, *TRAINING) for one in messages(path)]) > 25


def test_the_page_shows_what_slurm_s_scripts_say():
  script = " ".join((ROOT / "launch/slurm/step.sh").read_text().split())
  said = re.findall(r'echo "(.+?)" >&2', script.replace('" \\ "', " "))
  assert len(said) == 4
  page = " ".join(PAGE.split())
  for text in said:
    fixed = [piece.strip(" .()") for piece in re.split(r"\$\w+|\$\(\(.+\)\)", text)]
    assert not [piece for piece in fixed if piece not in page]


def checks() -> set[str]:
  """Returns the names of all checks of facedist.doctor."""
  names = set()
  for path in (*PREFLIGHT, ROOT / "facedist/doctor.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and node.args:
        name = ast.unparse(node.func)
        first = node.args[0]
        if re.search(r"(Finding|good|attempt|caught|of_error)$", name) and isinstance(
          first, ast.Constant
        ):
          names.add(first.value)
  return names


def test_the_page_has_every_finding_of_the_doctor():
  table = PAGE.partition("## Before a run")[2].partition("\n## ")[0]
  shown = set(re.findall(r"`([a-z-]+)`", table))
  found = checks()
  assert {"ports", "heartbeats", "batch", "checkpoint"} <= found
  assert found <= shown
  from facedist.preflight import cluster_checks

  assert set(cluster_checks._ALIKE) <= shown
