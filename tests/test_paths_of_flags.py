"""Every flag that is a path takes gs://, or says that it must be on a disk."""

import dataclasses
import importlib
import pathlib
import re
import typing

import pytest

from facedist import config, errors

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted(
  ".".join(path.relative_to(ROOT).with_suffix("").parts)
  for folder in ("facedist", "tfrecords_tools", "launch")
  for path in (ROOT / folder).glob("*.py")
  if "config.run_command(" in path.read_text()
)

IN_BUCKETS_TOO = {
  *("backbone_weights", "bounding_boxes", "checkpoint", "data_dir", "diff"),
  *("embeddings", "exclude_identities", "faces", "identities", "identity_meta"),
  *("image_list", "input", "input_dir", "input_dirs", "input_list", "landmarks"),
  *("lfw_names", "others", "output", "output_dir", "pairs", "pictures", "plot"),
  *("relabel", "report", "scores", "verification_data", "workdir", "write_excluded"),
}
ON_DISK = {
  *("cache_dir", "heartbeat_file", "scratch_dir"),
  *("launch.demo --output_dir", "launch.soak --output_dir"),
  *("launch.demo_picture --output", "launch.demo_picture --shards"),
}
NO_PATHS = {
  *("across_identities", "backbone", "dataset", "duplicates", "freeze_until"),
  *("full_schedule", "optimizer", "pooling", "head"),
  *("head_schedule", "missing_row", "module", "only_shards", "prefixes", "same_names"),
  *("split", "step_boundaries", "train_flags"),
}


def kind_of(module: str, field: dataclasses.Field) -> str:
  """Returns what a flag of text is."""
  if field.name in ON_DISK or f"{module} --{field.name}" in ON_DISK:
    return "on disk"
  if field.metadata["choices"] is not None or field.name in NO_PATHS:
    return "no path"
  return "in buckets too" if field.name in IN_BUCKETS_TOO else "not listed"


def flags_of_text(module: str) -> list[dataclasses.Field]:
  """Returns the fields of a command that are text."""
  loaded = importlib.import_module(module)
  text = pathlib.Path(str(loaded.__file__)).read_text()
  (name,) = re.findall(r"config\.run_command\(.*, ([\w.]+)\)", text)
  for part in name.split("."):
    loaded = getattr(loaded, part)
  hints = typing.get_type_hints(loaded)
  return [
    field
    for field in dataclasses.fields(loaded)  # type: ignore[arg-type]
    if hints[field.name] in (str, str | None)
  ]


@pytest.mark.parametrize("module", MODULES)
def test_every_flag_of_text_is_listed_as_what_it_is(module, monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "launch")  # its scripts import each other
  found = {field.name: kind_of(module, field) for field in flags_of_text(module)}
  assert "not listed" not in found.values(), found
  on_disk = {field.name for field in flags_of_text(module) if field.metadata["on_disk"]}
  assert on_disk == {name for name, kind in found.items() if kind == "on disk"}


def test_a_path_on_a_disk_is_refused_in_a_bucket():
  @dataclasses.dataclass(frozen=True)
  class Settings:
    cache_dir: str | None = config.setting(None, help="Copies.", on_disk=True)

  config.validate(Settings())
  config.validate(Settings("/tmp/gs"))
  with pytest.raises(
    errors.UsageError, match=r"^--cache_dir=gs://a/b must be on this machine.s disk;"
  ):
    config.validate(Settings("gs://a/b"))
