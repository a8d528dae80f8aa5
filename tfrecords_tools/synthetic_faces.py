"""Draws faces: a training set in VGGFace2's layout, a verification set in LFW's.

  python -m tfrecords_tools.synthetic_faces --output_dir=faces

writes faces/vggface2/train/n000001/0001_01.jpg and so on, with landmarks, face boxes,
list and names beside them, and faces/lfw/images/Tavo_Merlund/Tavo_Merlund_0001.jpg of
other people, with faces/lfw/pairs.txt. Build the shards from them as from the real
sets, whose formats they share; the builder finds the landmarks by itself:

  python -m tfrecords_tools.build --dataset=vggface2 \\
    --input_dir=faces/vggface2/train --output_dir=shards/vggface2
  python -m tfrecords_tools.build --dataset=lfw \\
    --input_dir=faces/lfw/images --output_dir=shards/lfw

A person's features (head, eyes, brows, nose, mouth, hair, beard, marks) and what
differs between images (pose, light, expression, covers, background, camera) come from
separate draws, keyed by seed, person and image. So the same flags give the
same bytes, in any number of processes, and each image could be drawn alone.
"""

import dataclasses
import json
import time

from absl import logging

from facedist import config, errors, progress, storage
from tfrecords_tools import parallel
from tfrecords_tools.synthetic import face_layout, population

SETTINGS_NAME = "synthetic_faces.json"
_IMAGES_WORTH_A_PROCESS = 500  # below, starting one takes longer than the images


@dataclasses.dataclass(frozen=True)
class FacesConfig:
  """The command's flags."""

  output_dir: str = config.setting(help="Folder for both sets, or gs://.", path=True)
  num_identities: int = config.setting(
    200, help="People of the training set.", at_least=1, at_most=999_999
  )
  images_per_identity: int = config.setting(
    20, help="Images of each person.", at_least=1, at_most=9999
  )
  lfw_identities: int = config.setting(
    100, help="People of the verification set; at least two per fold.", at_least=20
  )
  lfw_images_per_identity: int = config.setting(
    8, help="Images of each person.", at_least=2, at_most=9999
  )
  lfw_pairs_per_fold: int = config.setting(
    60,
    help="Pairs of the same person in each of 10 folds, and as many of two people.",
    at_least=1,
  )
  image_size: int = config.setting(
    160, help="Typical height of an image in pixels.", at_least=48, at_most=1024
  )
  seed: int = config.setting(0, help="Seed of everything that is drawn.", at_least=0)
  num_processes: int | None = config.setting(
    None,
    help="Processes; one for each core if not given.",
    at_least=1,
    at_most=1024,
    may_change=True,
  )


def main(settings: FacesConfig) -> None:
  """Draws both sets, unless they are there."""
  pairs = face_layout.choose_pairs(
    population.generator(settings.seed, population.PAIRS),
    num_people=settings.lfw_identities,
    num_images=settings.lfw_images_per_identity,
    num_pairs=settings.lfw_pairs_per_fold,
  )
  _claim(settings)
  pairs_path = storage.join(settings.output_dir, "lfw", "pairs.txt")
  if storage.exists(pairs_path):
    logging.info("%s is finished; nothing to do", settings.output_dir)
    return
  started = time.monotonic()
  training, unseen = _training_people(settings), _unseen_people(settings)
  drawn = _draw_all([*training, *unseen], num_processes=settings.num_processes)
  tables = _training_tables(settings, training, drawn[: len(training)])
  tables |= _place_tables(settings, "lfw", "images", drawn[len(training) :])
  tables[pairs_path] = face_layout.pairs_text(
    pairs, [person.name for person in unseen]
  )  # the last one says that all is done
  for path, text in tables.items():
    storage.write_bytes(path, text.encode())
  logging.info(
    "drew %s images of %d people to train on and %d others to verify in %s; %s",
    f"{sum(len(faces.names) for faces in drawn):,}",
    len(training),
    len(unseen),
    progress.duration(time.monotonic() - started),
    settings.output_dir,
  )


def _training_people(settings: FacesConfig) -> list[population.Person]:
  """Lists the people of the training set."""
  return [
    population.training_person(
      number,
      images=settings.images_per_identity,
      root=storage.join(settings.output_dir, "vggface2", "train"),
      image_size=settings.image_size,
      seed=settings.seed,
    )
    for number in range(settings.num_identities)
  ]


def _unseen_people(settings: FacesConfig) -> list[population.Person]:
  """Lists the people of the verification set."""
  return [
    population.unseen_person(
      number,
      images=settings.lfw_images_per_identity,
      root=storage.join(settings.output_dir, "lfw", "images"),
      image_size=settings.image_size,
      seed=settings.seed,
    )
    for number in range(settings.lfw_identities)
  ]


def _draw_all(
  people: list[population.Person], *, num_processes: int | None
) -> list[face_layout.Faces]:
  """Draws all people's images in many processes; in the order of `people`."""
  total = sum(len(person.files) for person in people)
  useful = min(parallel.available_cores(), 1 + total // _IMAGES_WORTH_A_PROCESS)
  drawn = []
  with progress.Progress("drew", total=total) as shown:
    for faces in parallel.ordered_map(
      population.draw_person, people, num_processes=num_processes or useful
    ):
      drawn.append(faces)
      shown.advance(len(faces.names))
  return drawn


def _training_tables(
  settings: FacesConfig,
  people: list[population.Person],
  drawn: list[face_layout.Faces],
) -> dict[str, str]:
  """Returns the texts of all tables beside the training images, by path."""
  tables = _place_tables(settings, "vggface2", "train", drawn)
  folder = storage.join(settings.output_dir, "vggface2")
  tables[storage.join(folder, "train_list.txt")] = face_layout.image_list(drawn)
  tables[storage.join(folder, "identity_meta.csv")] = face_layout.identity_table(
    (
      person.folder,
      person.name,
      len(person.files),
      population.identity_of(person).gender,
    )
    for person in people
  )
  return tables


def _place_tables(
  settings: FacesConfig, data_set: str, images: str, drawn: list[face_layout.Faces]
) -> dict[str, str]:
  """Returns the texts of landmarks and boxes of a folder of images, by path."""
  folder = storage.join(settings.output_dir, data_set)
  return {
    storage.join(folder, f"loose_landmark_{images}.csv"): face_layout.landmark_table(
      drawn
    ),
    storage.join(folder, f"loose_bb_{images}.csv"): face_layout.box_table(drawn),
  }


def _claim(settings: FacesConfig) -> None:
  """Notes the settings in the output folder, or finds the same there.

  Raises:
    errors.UsageError: The folder holds something else.
  """
  folder = settings.output_dir
  path = storage.join(folder, SETTINGS_NAME)
  content = dataclasses.asdict(settings)
  del content["output_dir"], content["num_processes"]  # say nothing of the drawings
  text = json.dumps(content, indent=2) + "\n"
  if storage.exists(path):
    found = storage.read_bytes(path).decode()
    if found != text:
      raise errors.UsageError(
        f"--output_dir={folder} holds faces of other settings (see {SETTINGS_NAME} in "
        "it); give a new folder."
      )
  elif storage.list_names(folder):
    raise errors.UsageError(
      f"--output_dir={folder} is not empty and holds no drawn faces; give a new folder."
    )
  else:
    storage.write_bytes(path, text.encode())


def run() -> None:
  """Runs the command; the console script's entry."""
  config.run_command(main, FacesConfig)


if __name__ == "__main__":
  run()
