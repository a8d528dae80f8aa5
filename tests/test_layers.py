"""Who may import whom: read from the sources, not run."""

import ast
import dataclasses
import pathlib
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("facedist", "tfrecords_tools")

# A part is a module or a package; parts of one layer do not import each other.
LAYERS = (
  ("facedist.errors",),
  ("facedist.progress", "facedist.addons", "facedist.deadline"),
  ("facedist.storage",),
  ("facedist.config",),
  ("facedist.data", "facedist.models", "facedist.distributed"),
  ("facedist.training",),
  ("facedist.evaluation",),
  ("facedist.preflight",),
  (
    "facedist.train",
    "facedist.evaluate",
    "facedist.embed",
    "facedist.export",
    "facedist.identify",
    "facedist.compare",
    "facedist.search",
    "facedist.report",
    "facedist.templates",
    "facedist.doctor",
  ),
)
TOOLS_MAY_IMPORT = (
  "facedist.errors",
  "facedist.config",
  "facedist.storage",
  "facedist.progress",
  "facedist.data.alignment",
  "facedist.data.shards",
  "facedist.data.decoding",
  "facedist.data.face_detection",
  "facedist.data.hashing",
  "facedist.data.image_names",
)
ROOT_NAMES = ("facedist", "facedist.__version__")  # the package itself is in no part


@dataclasses.dataclass(frozen=True)
class Import:
  """One import statement: in which module and line, of which module or name."""

  module: str
  line: int
  name: str

  def __str__(self) -> str:
    return f"{self.module}:{self.line} imports {self.name}"


def module_name(path: pathlib.Path) -> str:
  """Returns `facedist.data.samplers` for facedist/data/samplers/epoch_sampler.py."""
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(part for part in parts if part != "__init__")


def sources(*folders: str) -> list[pathlib.Path]:
  """Returns every Python file below these folders of the repository."""
  return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports_of(path: pathlib.Path) -> Iterator[Import]:
  """Yields what the file imports anywhere; `from a import b` as `a.b`."""
  module = module_name(path)
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield Import(module, node.lineno, alias.name)
    elif isinstance(node, ast.ImportFrom):
      origin = "." * node.level + (node.module or "")
      for alias in node.names:
        yield Import(module, node.lineno, f"{origin}.{alias.name}")


def is_in(name: str, package: str) -> bool:
  """Says whether the dotted name is the package or lies in it."""
  return name == package or name.startswith(package + ".")


def part_of(name: str) -> tuple[int, str] | None:
  """Returns layer and part of a dotted name; None where it is in no part."""
  layers = ((layer, part) for layer, parts in enumerate(LAYERS) for part in parts)
  return next((found for found in layers if is_in(name, found[1])), None)


def layer_error(found: Import) -> str | None:
  """Returns what is wrong with this import of facedist by facedist, if anything."""
  here, there = part_of(found.module), part_of(found.name)
  if found.name in ROOT_NAMES or found.module in ROOT_NAMES:
    return None
  if here is None or there is None:
    return f"{found}: one of them is in no layer; name it in LAYERS"
  if there == here or there[0] < here[0]:
    return None
  return f"{found}: layer {here[0]} may not import {there[1]} of layer {there[0]}"


@pytest.fixture(scope="module")
def imports() -> list[Import]:
  """Every import of the two packages."""
  return [found for path in sources(*PACKAGES) for found in imports_of(path)]


def test_each_layer_imports_only_the_layers_below(imports: list[Import]):
  inside = [
    found
    for found in imports
    if is_in(found.module, "facedist") and is_in(found.name, "facedist")
  ]
  assert inside
  assert not [error for found in inside if (error := layer_error(found))]
  upwards = Import("facedist.storage", 1, "facedist.config")
  assert layer_error(upwards)


def test_facedist_never_imports_its_tools(imports: list[Import]):
  others = ("tfrecords_tools", "launch", "benchmarks", "tests")
  inside = [found for found in imports if is_in(found.module, "facedist")]
  assert not [
    str(found) for found in inside if any(is_in(found.name, other) for other in others)
  ]


def test_the_tools_import_only_the_shard_format_and_the_lowest_layers(
  imports: list[Import],
):
  assert not [
    str(found)
    for found in imports
    if is_in(found.module, "tfrecords_tools")
    and is_in(found.name, "facedist")
    and not any(is_in(found.name, allowed) for allowed in TOOLS_MAY_IMPORT)
    and found.name not in ROOT_NAMES
  ]


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=module_name)
def test_nothing_but_definitions_happens_at_import(path: pathlib.Path):
  """Statements of a module define things; a bare call would do something."""
  allowed = ("os.environ.setdefault",)  # facedist/__init__.py says why
  for node in ast.parse(path.read_text()).body:
    calls = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    name = ast.unparse(node.value.func) if calls else ""  # type: ignore[attr-defined]
    assert not calls or name in allowed, f"line {node.lineno} calls {name} at import"
    assert not isinstance(node, ast.For | ast.While | ast.With), f"line {node.lineno}"


def test_the_standard_library_is_not_shadowed():
  names = {path.stem for path in sources("launch", "benchmarks")}
  assert not names & sys.stdlib_module_names
