"""Every flag that is a path takes gs://, or says that it must be on a disk."""

import dataclasses
import importlib
import operator
import pathlib
import re
import typing

import pytest
from absl import flags

from facedist import config, errors

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted(
  ".".join(path.relative_to(ROOT).with_suffix("").parts)
  for folder in ("facedist", "tfrecords_tools", "launch")
  for path in (ROOT / folder).glob("*.py")
  if "config.run_command(" in path.read_text()
)

IN_BUCKETS_TOO = {
  "backbone_weights", "bounding_boxes", "calibration", "checkpoint", "compare_with",
  "data", "data_dir", "diff", "embeddings", "exclude_identities", "faces", "first",
  "gallery", "groups", "identities", "identity_meta", "image_list", "input",
  "input_dir", "input_dirs", "input_list", "landmarks", "lfw_names", "others",
  "output", "output_dir", "pairs", "pictures", "plot", "query", "relabel", "report",
  "scores", "second", "verification_data", "workdir", "write_excluded", "yunet",
  "launch.demo --train_flags",
}  # fmt: skip
ON_DISK = {
  *("cache_dir", "heartbeat_file", "scratch_dir"),
  *("launch.demo --output_dir", "launch.soak --output_dir"),
  *("launch.demo_picture --output", "launch.demo_picture --shards"),
}
SEVERAL = {"input_dir", "input_dirs", "verification_data"}
NO_PATHS = {
  "across_identities", "backbone", "dataset", "duplicates", "freeze_until",
  "full_schedule", "head", "head_schedule", "missing_row", "module", "only_shards",
  "optimizer", "pooling", "prefixes", "same_names", "set_name", "split",
  "step_boundaries", "launch.soak --train_flags",
}  # fmt: skip


def kind_of(module: str, field: dataclasses.Field) -> str:
  """Returns what a flag of text is."""
  names = {field.name, f"{module} --{field.name}"}
  if names & ON_DISK:
    return "on disk"
  if field.metadata["choices"] is not None or names & NO_PATHS:
    return "no path"
  return "in buckets too" if names & IN_BUCKETS_TOO else "not listed"


def config_class(module: str) -> type:
  """Returns the configuration of a command."""
  loaded = importlib.import_module(module)
  text = pathlib.Path(str(loaded.__file__)).read_text()
  (name,) = re.findall(r"config\.run_command\(.*, ([\w.]+)\)", text)
  return operator.attrgetter(name)(loaded)


def flags_of_text(module: str) -> list[dataclasses.Field]:
  """Returns the fields of a command that are text."""
  kind = config_class(module)
  hints = typing.get_type_hints(kind)
  return [
    field
    for field in dataclasses.fields(kind)
    if hints[field.name] in (str, str | None)
  ]


@pytest.mark.parametrize("module", MODULES)
def test_every_flag_of_text_is_declared_as_what_it_is(module, monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "launch")  # its scripts import each other
  for field in flags_of_text(module):
    kind = kind_of(module, field)
    assert kind != "not listed", field.name
    is_path = kind != "no path"
    has_several = is_path and field.name in SEVERAL
    declared = [field.metadata[name] for name in ("on_disk", "paths", "path")]
    expected = [kind == "on disk", has_several, is_path and not has_several]
    assert declared == expected, field.name


@dataclasses.dataclass(frozen=True)
class Places:
  """One flag of each kind of path."""

  workdir: str | None = config.setting(None, help="A path.", path=True)
  inputs: str | None = config.setting(None, help="Paths.", paths=True)
  cache_dir: str | None = config.setting(None, help="Copies.", on_disk=True)


def places(*words: str) -> Places:
  """Returns the configuration of a command line."""
  values = flags.FlagValues()
  config.define_flags(Places, values)
  values(["command", *words])
  return config.from_flags(Places, values)


@pytest.mark.parametrize(
  ("given", "path"),
  [
    ("runs/a", "runs/a"),
    ("~/runs", "/home/ada/runs"),
    ("~", "/home/ada"),
    ("./~x", "./~x"),
    ("file:///x/y", "/x/y"),
    ("FILE:///x", "/x"),
    ("file://localhost/x", "/x"),
    ("file:/x", "/x"),
    (" /x\n", "/x"),
    ("\t gs://b/x ", "gs://b/x"),
    ("GS://b/X", "gs://b/X"),
    ("Gs://b", "gs://b"),
    ("run-12:30", "run-12:30"),
    ("costs$5", "costs$5"),
    ("a b/[1]*?{é}", "a b/[1]*?{é}"),
    ("none", "none"),
  ],
)
def test_a_path_is_taken_in_its_plain_form(given: str, path: str, monkeypatch):
  monkeypatch.setenv("HOME", "/home/ada")
  assert places(f"--workdir={given}").workdir == path
  assert places(f"--inputs={given}, {given}").inputs == f"{path},{path}"


@pytest.mark.parametrize("flag", ["workdir", "inputs", "cache_dir"])
@pytest.mark.parametrize(
  ("path", "says"),
  [
    *((f"{scheme}b/x", "local paths and gs://BUCKET/NAME are supported")
      for scheme in ("s3:/", "s3://", "S3://", "gcs://", "hdfs://", "az://", "https://")),
    ("gs:/b/x", "local paths and gs://BUCKET/NAME are supported"),
    ("gs:b/x", "is not a path"),
    ("C:\\faces", "is not a path"),
    ("./gs://b/x", "is not a path"),
    ("gs:///x", "names no bucket"),
    ("gs://", "names no bucket"),
    ("file://host/x", "names a host"),
    ("file:///a%20b", "write the path itself"),
    ("$HOME/x", r"holds \$HOME, which the shell did not expand"),
    ("/runs/${USER}/x", r"holds \${USER}, which"),
    ("gs://b/$JOB", r"holds \$JOB, which"),
    ("/runs/$(date)", r"holds \$\(date\), which"),
    ("~no-such-user/x", "names the home of a user"),
    (" ", "names no path"),
    ("a\0b", "NUL"),
    ("a\nb", "line break"),
    ("gs://b/a\rb", "line break"),
    ("a\udcffb", "is not UTF-8"),
  ],
)  # fmt: skip
def test_a_path_that_would_go_elsewhere_is_refused(flag: str, path: str, says: str):
  with pytest.raises(errors.UsageError, match=f"^'?--{flag}=.*{says}") as caught:
    places(f"--{flag}={path}")
  assert "\n" not in str(caught.value)


def test_a_comma_in_the_name_of_a_folder_that_exists_divides_nothing(tmp_path):
  folder = tmp_path / "a, b"
  folder.mkdir()
  assert places(f"--inputs={folder}").inputs == str(folder)
  assert places(f"--inputs={folder}, c").inputs == f"{tmp_path}/a,b,c"


@pytest.mark.parametrize(
  ("given", "paths"),
  [
    ("lfw=/data/lfw, cfp_fp=GS://b/cfp", "lfw=/data/lfw,cfp_fp=gs://b/cfp"),
    ("a=~/x,~/y", "a=/home/ada/x,/home/ada/y"),
    ("a=b=c", "a=b=c"),
    ("./a=~/x", "./a=~/x"),
    ("gs://b/a=c", "gs://b/a=c"),
  ],
)
def test_a_name_before_a_path_stays_before_its_plain_form(
  given: str, paths: str, monkeypatch
):
  monkeypatch.setenv("HOME", "/home/ada")
  assert places(f"--inputs={given}").inputs == paths


@pytest.mark.parametrize("given", ["lfw=", "a=/x,lfw= ", "lfw=s3://b/x"])
def test_a_name_before_no_path_is_refused(given: str):
  with pytest.raises(errors.UsageError, match=r"^--inputs=.*(no path|not a path)"):
    places(f"--inputs={given}")


def test_a_path_on_a_disk_is_refused_in_a_bucket():
  assert places("--cache_dir=/tmp/gs").cache_dir == "/tmp/gs"
  refusal = r"^--cache_dir=gs://a/b must be on this machine.s disk;"
  with pytest.raises(errors.UsageError, match=refusal):
    places("--cache_dir=gs://a/b")
