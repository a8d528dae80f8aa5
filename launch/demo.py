"""Runs the whole way once, on drawn faces; what `make demo` does.

  python launch/demo.py --output_dir=demo

Draws faces of people to train on and of others, builds and checks the shards of both,
trains with two local workers while a process beside them scores every checkpoint on
the others, and writes the others' embeddings as JSON. It ends with the scores, a
picture and the paths of all that it made. Each command is shown before it runs; the
same commands serve real faces.

Started again with the same --output_dir it continues where it stopped; what is finished
stays as it is. When a command fails, the demo ends with its exit code.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import sys
import time
from typing import TYPE_CHECKING

from facedist import config, errors, storage

if TYPE_CHECKING:
  from launch import together
else:
  import together  # a script finds its own folder's modules, and they no package

_FOLDER = pathlib.Path(__file__).resolve().parent
_LAUNCHER = str(_FOLDER / "local.py")
_PAINTER = str(_FOLDER / "demo_picture.py")
_TRAIN_FLAGS = str(_FOLDER.parent / "configs" / "demo.flags")


@dataclasses.dataclass(frozen=True)
class DemoConfig:
  """The demo's flags."""

  output_dir: str = config.setting(
    "demo", help="Folder for everything that the demo makes.", on_disk=True
  )
  workers: int = config.setting(2, help="Training processes.", at_least=1, at_most=1024)
  train_flags: str = config.setting(
    _TRAIN_FLAGS, help="Flagfile of the training.", path=True
  )
  num_identities: int = config.setting(200, help="People to train on.", at_least=2)
  images_per_identity: int = config.setting(
    20, help="Images of each person.", at_least=2
  )
  lfw_identities: int = config.setting(
    100, help="Other people, for verification and embeddings.", at_least=20
  )
  lfw_pairs_per_fold: int = config.setting(
    60,
    help="Pairs of the same person in each of 10 folds, and as many of two people.",
    at_least=1,
  )
  image_size: int = config.setting(
    64, help="Height and width of the aligned images in pixels.", at_least=32
  )
  seed: int = config.setting(0, help="Seed of the faces.", at_least=0)


@dataclasses.dataclass(frozen=True)
class Places:
  """Where the demo's parts lie."""

  faces: str
  train_shards: str
  lfw_shards: str
  workdir: str
  scores: str
  report: str
  embeddings: str
  picture: str


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of the demo: commands that run at the same time.

  Attributes:
    title: What it does.
    commands: Each continues, or has nothing to do, when it is started again.
    made: The file that is there once the stage is over; none if they look themselves.
  """

  title: str
  commands: tuple[together.Command, ...]
  made: str | None = None


def main(settings: DemoConfig) -> int:
  """Runs what is not finished yet, then tells what came out."""
  together.exit_on_signals()
  started = time.monotonic()
  places = _places(settings.output_dir)
  stages = [*_data_stages(settings, places), *_network_stages(settings, places)]
  for number, stage in enumerate(stages, start=1):
    _say(f"\n{number}/{len(stages)} {stage.title}")
    if stage.made is not None and storage.exists(stage.made):
      _say(f"  {stage.made} is there; nothing to do")
      continue
    for command in stage.commands:
      _say("  " + shlex.join(_readable(word) for word in command.words))
    code = together.run(stage.commands)
    if code != errors.ExitCode.DONE:
      print(f"error: step {number} ended with exit code {code}.", file=sys.stderr)
      return code
  _say("\n" + _summary(places, seconds=time.monotonic() - started))
  return errors.ExitCode.DONE


def _places(output_dir: str) -> Places:
  """Returns the places of all parts."""
  workdir = storage.join(output_dir, "run")
  return Places(
    faces=storage.join(output_dir, "faces"),
    train_shards=storage.join(output_dir, "shards", "vggface2"),
    lfw_shards=storage.join(output_dir, "shards", "lfw"),
    workdir=workdir,
    scores=storage.join(workdir, "metrics.jsonl"),
    report=storage.join(workdir, "report.html"),
    embeddings=storage.join(output_dir, "embeddings.json"),
    picture=storage.join(output_dir, "demo.png"),
  )


def _data_stages(settings: DemoConfig, places: Places) -> list[Stage]:
  """Lists what makes the data."""
  draw = _module(
    "tfrecords_tools.synthetic_faces",
    f"--output_dir={places.faces}",
    f"--num_identities={settings.num_identities}",
    f"--images_per_identity={settings.images_per_identity}",
    f"--lfw_identities={settings.lfw_identities}",
    f"--lfw_pairs_per_fold={settings.lfw_pairs_per_fold}",
    f"--seed={settings.seed}",
  )

  def build(dataset: str, images: str, shards: str) -> together.Command:
    return _module(
      "tfrecords_tools.build",
      f"--dataset={dataset}",
      f"--input_dir={storage.join(places.faces, dataset, images)}",
      f"--output_dir={shards}",
      f"--image_size={settings.image_size}",
    )

  shards = (places.train_shards, places.lfw_shards)
  return [
    Stage("Draw faces", (draw,)),
    Stage(
      "Build the shards to train on",
      (build("vggface2", "train", places.train_shards),),
    ),
    Stage(
      "Build the verification set, of other people",
      (build("lfw", "images", places.lfw_shards),),
    ),
    Stage(
      "Check both",
      tuple(_module("tfrecords_tools.verify", folder) for folder in shards),
    ),
  ]


def _network_stages(settings: DemoConfig, places: Places) -> list[Stage]:
  """Lists what trains, uses and shows the network."""
  run, shards = f"--workdir={places.workdir}", places.lfw_shards
  train = _script(
    _LAUNCHER,
    *(f"--workers={settings.workers}", "--"),
    *(f"--flagfile={settings.train_flags}", f"--data_dir={places.train_shards}", run),
  )
  evaluate = _module(
    "facedist.evaluate",
    *(run, f"--verification_data={shards}", "--poll_seconds=2"),
    prefix="[evaluator] ",
  )
  embed = _module(
    "facedist.embed",
    *(run, f"--input={shards}", f"--output={places.embeddings}", "--mirror"),
  )
  paint = _script(
    _PAINTER,
    *(f"--output={places.picture}", f"--faces={storage.join(places.faces, 'lfw')}"),
    *(f"--shards={shards}", f"--embeddings={places.embeddings}"),
    f"--scores={places.scores}",
  )
  return [
    Stage(
      f"Train with {settings.workers} workers and score each checkpoint beside them",
      (train, evaluate),
    ),
    Stage("Write the embeddings of the other people", (embed,), made=places.embeddings),
    Stage("Draw what came out", (paint,), made=places.picture),
  ]


def _script(path: str, *arguments: str) -> together.Command:
  """Returns the command that runs a script beside this one."""
  return together.Command((sys.executable, path, *arguments))


def _module(name: str, *arguments: str, prefix: str = "") -> together.Command:
  """Returns the command that runs a Python module of this installation."""
  return together.Command((sys.executable, "-m", name, *arguments), prefix)


def _readable(word: str) -> str:
  """Returns a word of a command as a user would type it."""
  if word == sys.executable:
    return "python"
  return os.path.relpath(word) if word in (_LAUNCHER, _PAINTER) else word


def _summary(places: Places, *, seconds: float) -> str:
  """Returns the table of scores and the paths of what was made."""
  lines = storage.read_bytes(places.scores).splitlines()
  rows = sorted(map(json.loads, lines), key=lambda row: int(row["step"]))
  pairs, folds = rows[-1]["num_pairs"], len(rows[-1]["fold_accuracies"])
  shown = [
    f"Accuracy on {pairs} pairs of people that were not trained on, {folds} folds:",
    "  step   accuracy",
  ]
  shown += [
    f"{row['step']:6d}   {row['accuracy_mean']:.4f} ± {row['accuracy_std']:.4f}"
    for row in rows
  ]
  made = dataclasses.asdict(places) | {"time": f"{seconds:.0f} s"}
  shown += [""] + [
    f"{name.replace('_', ' '):14s}{value}" for name, value in made.items()
  ]
  return "\n".join(shown)


def _say(text: str) -> None:
  """Prints at once, so that the lines of commands come after it."""
  print(text, flush=True)


def run() -> None:
  """Runs the command."""
  config.run_command(main, DemoConfig)


if __name__ == "__main__":
  run()
