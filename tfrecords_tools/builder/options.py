"""The builder's flags."""

import dataclasses

from facedist import config
from tfrecords_tools.sources import base


@dataclasses.dataclass(frozen=True)
class BuildConfig:
  """The flags of `tfrecords_tools.build`."""

  dataset: str = config.setting(
    help="Layout of the input.",
    choices=["vggface2", "rec", "webdataset", "lfw", "pairs", "bin", "npz", "digits"],
  )
  output_dir: str = config.setting(
    help="Folder for the shards, local or gs://; each of several .bin files gets a "
    "folder of its own in it.",
    path=True,
  )
  input_dir: str | None = config.setting(
    None,
    help="Folder of the identities' folders, local or gs://; or FILE.tar, or several "
    "with commas or a *; or for bin FILE.bin, several or a folder of them; or for "
    "rec FILE.rec or its folder; or for webdataset tars, such as "
    "train-{000..099}.tar, or their folder; or for npz FILE.npz.",
    paths=True,
  )
  input_list: str | None = config.setting(
    None,
    help="File of the images' paths, one per line, that end in identity/image: "
    "absolute, gs://, or relative to --input_dir. A header, labels and MXNet's "
    "index are ignored.",
    path=True,
  )
  list_labels: bool = config.setting(
    False,
    help="vggface2: the identities are the labels of --input_list, not the images' "
    "folders; for images that need no landmarks and no boxes.",
  )
  landmarks: str | None = config.setting(
    None,
    help="CSV of five landmarks per image, in pixels of the upright image; found "
    "beside --input_dir as loose_landmark_FOLDER.csv; 'none' ignores it.",
    path=True,
  )
  bounding_boxes: str | None = config.setting(
    None,
    help="CSV of a face box per image, in pixels of the upright image; found beside "
    "--input_dir as loose_bb_FOLDER.csv; 'none' ignores it.",
    path=True,
  )
  missing_row: str | None = config.setting(
    None,
    help="An image without a row is left out (skip, vggface2's default), cut by its "
    "box or from the centre (crop), or ends the build (fail, lfw's default).",
    choices=base.MISSING_ROW,
  )
  margin: float = config.setting(
    0.3, help="Fraction of a face box's longer side that is added to it.", at_least=0.0
  )
  image_size: int = config.setting(
    112, help="Height and width of the images in pixels.", at_least=8, at_most=4096
  )
  quality: int = config.setting(95, help="JPEG quality.", at_least=1, at_most=100)
  num_shards: int | None = config.setting(
    None,
    help="Shards (of the train split); one for each 10,000 images if not given.",
    at_least=1,
    at_most=99_999,
  )
  only_shards: str | None = config.setting(
    None,
    help="Numbers of shards, such as 3,17: writes only these of each split, even if "
    "they exist.",
  )
  num_tasks: int | None = config.setting(
    None,
    help="Tasks that split the shards; a Slurm array's size if not given, else one.",
    at_least=1,
  )
  task_index: int | None = config.setting(
    None,
    help="This task, from 0; read from SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX.",
    at_least=0,
  )
  finalize: bool = config.setting(
    False,
    help="Builds nothing: checks that the shards of all tasks exist and writes the "
    "manifest.",
  )
  seed: int = config.setting(
    0, help="Seed of shuffling, hold-out and --make_pairs.", at_least=0
  )
  val_fraction: float = config.setting(
    0.0,
    help="Fraction of each identity's images held out as the split 'val'; not for npz, "
    "whose test images are that split.",
    at_least=0.0,
    at_most=0.5,
  )
  max_bad: int = config.setting(
    100,
    help="Images that may be unreadable before the build fails; none may for lfw and "
    "bin.",
    at_least=0,
  )
  scratch_dir: str | None = config.setting(
    None,
    help="Local folder for the plan while it is made, about 300 bytes per image, "
    "created if needed; the system's temporary folder if not given.",
    on_disk=True,
  )
  num_processes: int | None = config.setting(
    None, help="Processes; one for each core if not given.", at_least=1, at_most=1024
  )
  image_list: str | None = config.setting(
    None,
    help="List of the images to take, identity/image per line; found beside "
    "--input_dir as FOLDER_list.txt; 'none' takes all.",
    path=True,
  )
  identity_meta: str | None = config.setting(
    None,
    help="CSV of people's names; found beside --input_dir as identity_meta.csv; "
    "'none' ignores it.",
    path=True,
  )
  identities: str | None = config.setting(
    None,
    help="File of the identities to take, one per line.",
    path=True,
  )
  exclude_identities: str | None = config.setting(
    None,
    help="File of identities to leave out, one per line.",
    path=True,
  )
  min_images_per_identity: int = config.setting(
    1,
    help="Smallest number of images of an identity, with those of val and "
    "without those that --missing_row leaves out; unreadable images count.",
    at_least=1,
  )
  max_images_per_identity: int | None = config.setting(
    None,
    help="Largest number of images of an identity in train; --seed decides "
    "which, as tfrecords_tools.select does from the whole build.",
    at_least=1,
  )
  lfw_names: str | None = config.setting(
    None,
    help="LFW's pairs.txt or people.txt: reports identities that are also in LFW.",
    path=True,
  )
  make_pairs: int | None = config.setting(
    None,
    help="vggface2, rec, webdataset: builds a verification set of so many pairs, a "
    "multiple of 20, that --seed draws: ten folds of distinct identities, half of the "
    "pairs of one person.",
    at_least=1,
  )
  pairs: str | None = config.setting(
    None,
    help="lfw: the list of pairs; found in or beside --input_dir as pairs.txt. pairs: "
    "the CSV file, image1,image2,same or with the fold behind.",
    path=True,
  )
