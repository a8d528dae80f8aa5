"""facedist.templates on drawn faces, with the recorded run's small network."""

import csv
import json
import pathlib
import shutil

import cv2
import numpy as np
import pytest
from sklearn import metrics

from facedist import errors, storage, templates
from facedist.data import alignment
from facedist.evaluation import embeddings_file
from facedist.templates import TemplatesConfig
from facedist.training import inference
from facedist.training.checkpoint import checkpoints
from tfrecords_tools import synthetic_faces

RUN = str(pathlib.Path(__file__).parent / "recorded" / "run")
PEOPLE, IMAGES = 12, 6


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """IJB-C's layout with drawn people of three templates: four images, one and one.

  The first template has a video of three images and a photo.
  """
  faces = tmp_path_factory.mktemp("faces")
  number = {"num_identities": PEOPLE, "images_per_identity": IMAGES, "num_processes": 1}
  lfw = {"lfw_identities": 20, "lfw_images_per_identity": 2, "lfw_pairs_per_fold": 1}
  synthetic_faces.main(synthetic_faces.FacesConfig(str(faces), **number, **lfw))
  folder = tmp_path_factory.mktemp("sets") / "IJBC"
  (folder / "loose_crop").mkdir(parents=True)
  (folder / "meta").mkdir()
  with open(faces / "vggface2" / "loose_landmark_train.csv") as lines:
    rows = list(csv.reader(lines))[1:]
  points, media = [], []
  for number, (name, *numbers) in enumerate(rows):
    source = faces / "vggface2" / "train" / f"{name}.jpg"
    shutil.copy(source, folder / "loose_crop" / f"{number}.jpg")
    points.append(" ".join([f"{number}.jpg", *numbers, f"{0.5 + number % 5 / 10}"]))
    person, image = divmod(number, IMAGES)
    template = 3 * person + max(0, image - 3)
    media.append(f"{number}.jpg {100 + template} {1 if image < 3 else 2}")
  lists = {
    "name_5pts_score.txt": points,
    "face_tid_mid.txt": media,
    "template_pair_label.txt": [
      f"{100 + i} {100 + j} {int(i // 3 == j // 3)}"
      for i in range(3 * PEOPLE)
      for j in range(i)
    ],
  }
  for name, person in (("gallery_G1", range(6)), ("gallery_G2", range(6, PEOPLE))):
    lists[f"1N_{name}.csv"] = ["t,s", *(f"{100 + 3 * n},{n}" for n in person)]
  lists["1N_probe_mixed.csv"] = [
    "t,s",
    *(f"{100 + 3 * n + k},{n}" for n in range(PEOPLE) for k in (1, 2)),
  ]
  for name, content in lists.items():
    (folder / "meta" / f"ijbc_{name}").write_text("\n".join(content) + "\n")
  return folder


def _settings(
  folder: pathlib.Path, tmp_path: pathlib.Path, **changes
) -> TemplatesConfig:
  values = {
    "protocol": "ijbc",
    "data": str(folder),
    "workdir": RUN,
    "embeddings": str(tmp_path / "embeddings.npz"),
    "output": str(tmp_path / "figures.json"),
    "overwrite": True,
    "batch_size": 16,
  }
  return TemplatesConfig(**(values | changes))


def _figures(tmp_path: pathlib.Path) -> dict:
  return json.loads((tmp_path / "figures.json").read_text())


def _embedded(images: list[np.ndarray]) -> np.ndarray:
  """Returns the network's raw embeddings of images plus mirrored images."""
  (checkpoint,) = checkpoints.list_checkpoints(RUN)
  network = inference.load_network(RUN, checkpoint)
  batch = np.stack(images)
  return network.embed(batch).numpy() + network.embed(batch[:, :, ::-1]).numpy()


def _pooled(folder: pathlib.Path, *, use_face_scores: bool) -> np.ndarray:
  """Returns float64[templates, 16], aligned by least squares and pooled by hand."""
  faces, scores = [], []
  target = alignment.TEMPLATE / alignment.TEMPLATE_SIZE * 28
  for line in (folder / "meta" / "ijbc_name_5pts_score.txt").read_text().splitlines():
    name, *numbers, score = line.split()
    x, y = np.array(numbers, float).reshape(5, 2).T
    one, zero = np.ones(5), np.zeros(5)
    equations = np.concatenate(
      [np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)]
    )
    a, b, left, top = np.linalg.lstsq(equations, target.T.ravel(), rcond=None)[0]
    image = cv2.imread(str(folder / "loose_crop" / name))
    warp = np.array([[a, -b, left], [b, a, top]])
    faces.append(cv2.warpAffine(image, warp, (28, 28))[:, :, ::-1])
    scores.append(float(score))
  embeddings = _embedded(faces).astype(np.float64)
  if use_face_scores:
    embeddings *= np.array(scores)[:, np.newaxis]
  pooled = []
  for person in embeddings.reshape(PEOPLE, IMAGES, -1):
    pooled += [person[:3].mean(axis=0) + person[3], person[4], person[5]]
  return np.array([each / np.linalg.norm(each) for each in pooled])


def test_drawn_templates_score_as_computed_by_hand(drawn, tmp_path, capsys):
  lists = shutil.copytree(drawn / "meta", tmp_path / "lists" / "meta").parent
  # the second needs no network and no images: it has the file of embeddings
  for use_face_scores, folder, workdir in ((True, drawn, RUN), (False, lists, None)):
    settings = _settings(
      folder, tmp_path, workdir=workdir, use_face_scores=use_face_scores
    )
    assert templates.main(settings) == errors.ExitCode.DONE
    said = _figures(tmp_path)
    assert said["pooling"]["use_face_scores"] == use_face_scores
    assert (said["num_images"], said["num_templates"]) == (72, 36)
    assert said["network"]["weights_crc32c"]
    assert said["network"]["versions"]["tensorflow"]
    pooled = _pooled(drawn, use_face_scores=use_face_scores)
    cosines = pooled @ pooled.T
    first, second = np.tril_indices(36, k=-1)
    same, scores = first // 3 == second // 3, cosines[first, second]
    verified = said["verification"]
    assert verified["auc"] == pytest.approx(metrics.roc_auc_score(same, scores))
    assert [at["far"] for at in verified["tar_at_far"]] == [0.1, 0.01]
    for at in verified["tar_at_far"]:
      refused = np.sort(scores[~same])[::-1][int(at["far"] * (~same).sum())]
      assert at["tar"] == np.mean(scores[same] > refused)
      assert at["low"] <= at["tar"] <= at["high"]
    probes = np.flatnonzero(np.arange(36) % 3)
    best = cosines[probes, ::3].argmax(axis=1) == probes // 3
    assert said["identification"]["rank_1"] == np.mean(best)
    unmated = [each["num_unmated"] for each in said["identification"]["open_sets"]]
    assert unmated == [12, 12]
    table = capsys.readouterr().out
    assert "ijbc 1:1, 36 pairs of one person, 594 of two" in table
    assert f"rank-1 {np.mean(best):.4f}" in table


def test_set_run_and_files_may_be_in_a_bucket(drawn, tmp_path, bucket):
  for root in (drawn, pathlib.Path(RUN)):
    for path in root.rglob("*"):
      if path.is_file():
        storage.upload(str(path), f"{bucket}/{path.relative_to(root.parent)}")
  settings = {"workdir": f"{bucket}/run", "embeddings": f"{bucket}/embeddings.npz"}
  settings["output"] = f"{bucket}/figures.json"
  templates.main(_settings(f"{bucket}/IJBC", tmp_path, **settings))
  templates.main(_settings(drawn, tmp_path))
  said = json.loads(storage.read_bytes(f"{bucket}/figures.json"))
  assert said["verification"] == _figures(tmp_path)["verification"]
  assert said["identification"] == _figures(tmp_path)["identification"]


def test_a_file_of_other_embeddings_is_refused(drawn, tmp_path):
  templates.main(_settings(drawn, tmp_path))
  with pytest.raises(errors.UsageError, match="has mirrored True, not False"):
    templates.main(_settings(drawn, tmp_path, mirror=False))
  (tmp_path / "b" / "meta").mkdir(parents=True)
  for path in (drawn / "meta").iterdir():
    shutil.copy(path, tmp_path / "b" / "meta" / path.name.replace("ijbc", "ijbb"))
  with pytest.raises(errors.UsageError, match="has protocol ijbc, not ijbb"):
    templates.main(_settings(tmp_path / "b", tmp_path, protocol="ijbb"))
  path = str(tmp_path / "other.npz")
  with embeddings_file.new_file(path, {"normalized": True}, overwrite=False) as out:
    out.add(path="0.jpg", identity=None, embedding=np.ones(2, np.float32))
  with pytest.raises(errors.UsageError, match="length 1, which is no weight"):
    templates.main(_settings(drawn, tmp_path, embeddings=path, workdir=None))


def test_a_broken_image_is_skipped_and_a_template_needs_one(drawn, tmp_path, caplog):
  folder = pathlib.Path(shutil.copytree(drawn, tmp_path / "set"))
  (folder / "loose_crop" / "1.jpg").write_bytes(b"no image")
  assert templates.main(_settings(folder, tmp_path)) == errors.ExitCode.PARTIAL
  assert "skipped 1.jpg" in caplog.text
  assert _figures(tmp_path)["num_skipped"] == 1
  (folder / "loose_crop" / "4.jpg").write_bytes(b"no image")
  again = str(tmp_path / "again.npz")
  with pytest.raises(errors.DataError, match=r"1 of 36 templates .* template 101"):
    templates.main(_settings(folder, tmp_path, embeddings=again))
  (folder / "loose_crop" / "5.jpg").unlink()
  with pytest.raises(errors.DataError, match=r"lacks 1 of 72 images, such as 5\.jpg"):
    templates.main(_settings(folder, tmp_path, embeddings=str(tmp_path / "3.npz")))


def test_tinyface_is_searched(tmp_path, capsys):
  rng = np.random.default_rng(0)
  names = [f"Gallery_Match/{n}_1.png" for n in range(5)]
  names += [f"Gallery_Distractor/{n}.png" for n in range(30)]
  names += [f"Probe/{n}_2.png" for n in range(5)]
  pixels = rng.integers(0, 256, (40, 28, 28, 3), np.uint8)
  pixels[35:] = pixels[:5] // 2 + rng.integers(0, 128, (5, 28, 28, 3), np.uint8)
  for name, image in zip(names, pixels, strict=True):
    path = tmp_path / "tiny" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)
  settings = _settings(tmp_path / "tiny", tmp_path, protocol="tinyface")
  assert templates.main(settings) == errors.ExitCode.DONE
  vectors = _embedded([image[:, :, ::-1] for image in pixels])
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  cosines = vectors[35:] @ vectors[:35].T
  ranks = np.sum(cosines >= np.diag(cosines)[:, np.newaxis], axis=1)
  said = _figures(tmp_path)["search"]
  assert said["cmc"] == [np.mean(ranks <= n) for n in range(1, 21)]
  assert (said["num_probes"], said["num_gallery"]) == (5, 35)
  assert "tinyface: 5 probes among 35 images" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"workdir": None}, "does not exist; add --workdir to make it"),
    ({"embeddings": "embeddings.txt"}, "must end in .json"),
    ({"overwrite": False}, "exists; choose another name or add --overwrite"),
  ],
)
def test_wrong_flags_are_refused_before_work(drawn, tmp_path, changes, said):
  (tmp_path / "figures.json").write_text("{}")
  with pytest.raises(errors.UsageError, match=said):
    templates.main(_settings(drawn, tmp_path, **changes))
  assert (tmp_path / "figures.json").read_text() == "{}"
