"""The report of a run written by hand: read as HTML, and opened in Chromium."""

import dataclasses
import html
import html.parser
import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest

from facedist import config, errors, report, storage
from facedist.evaluation import report as scores_report
from facedist.evaluation import report_page, score_details, verification
from facedist.training.config import TrainConfig

NAME = 'a&b/<script>alert("x")</script>.jpg'
CHROMIUM = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
  None,
)
PROBE = """
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(element => {
    const frame = element.contentWindow;
    const images = [...frame.document.images];
    const requests = frame.performance.getEntriesByType("resource");
    return {
      width: frame.innerWidth,
      scroll_width: frame.document.documentElement.scrollWidth,
      images: images.length,
      broken: images.filter(each => !each.naturalWidth).length,
      requests: requests.map(each => each.name).filter(each => !/^data:/.test(each)),
    };
  });
  document.documentElement.textContent = JSON.stringify(found);
});
"""


class Outline(html.parser.HTMLParser):
  """Collects the tags and the text of a page."""

  def __init__(self, page: str) -> None:
    super().__init__()
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.text = ""
    self.feed(page)

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data: str) -> None:
    self.text += data

  def all(self, tag: str) -> list[dict[str, str | None]]:
    return [attributes for name, attributes in self.tags if name == tag]


def _score(workdir: pathlib.Path, step: int, name: str, **more) -> scores_report.Row:
  """Adds a score of random pairs to a run, with its details."""
  rng = np.random.default_rng(step)
  same = np.arange(400) % 2 == 0
  scores = np.where(same, 0.6, 0.2) + 0.2 * rng.normal(size=400)
  result = verification.verify(scores, same, np.arange(400) % 10)
  key = {"step": step, "set": name, "fingerprint": "aa", "mirrored": True}
  key |= {"weights": "trained"} | more
  row = scores_report.row(
    result, key_fields=key, checkpoint=f"step-{step}", images=99, seconds=1.5
  )
  threshold = float(np.mean(result.fold_thresholds))
  jpeg = score_details.encode(rng.integers(0, 255, (32, 32, 3), np.uint8))
  wrong = [
    tuple(
      score_details.HardPair(float(scores[each]), (NAME, ""), (jpeg, jpeg))
      for each in places
    )
    for places in score_details.hardest(scores, same, threshold)
  ]
  labels = np.repeat(np.arange(10), 6)
  points, labels = score_details.map_points(
    np.eye(12)[labels] + 0.1 * rng.normal(size=(60, 12)), labels
  )
  details = score_details.ScoreDetails(
    key, threshold, scores.astype(np.float32), same, *wrong, points, labels
  )
  score_details.save(details, str(workdir))
  with (workdir / "metrics.jsonl").open("a") as stream:
    stream.write(json.dumps(row) + "\n")
  return row


def _interval(step: int, **more) -> str:
  """Returns a line of a training log, of ten steps."""
  entry = {"kind": "train", "step": step, "loss": 9.0 / step, "losses": [0.0] * 10}
  entry |= {"accuracy": 0.5, "learning_rate": 0.1, "images_per_second": 100.0}
  return json.dumps(entry | {"input_wait": 0.01} | more) + "\n"


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
  """A run with everything that a page shows."""
  folder = tmp_path / "run"
  folder.mkdir()
  (folder / "config.json").write_text(config.to_json(TrainConfig(margin=0.31)))
  lines = [_interval(step) for step in range(10, 5010, 10)]
  lines += [
    json.dumps({"kind": "validation", "step": 5000, "loss": 1, "accuracy": 0.7})
  ]
  (folder / "train_metrics.jsonl").write_text("".join(lines) + "\n")
  for step in (100, 200):
    _score(folder, step, "lfw")
    _score(folder, step, "cfp <i>")
  return folder


def test_the_page_shows_the_run_in_tables_and_pictures(workdir: pathlib.Path):
  report_page.write(str(workdir))
  page = Outline((workdir / "report.html").read_text())
  lfw = [row for row in _rows(workdir) if row["set"] == "lfw"]
  for row in lfw:
    assert f"{row['accuracy_mean']:.4f} ± {row['accuracy_std']:.4f}" in page.text
  interval = lfw[1]["tar_at_far"][1]
  shown = f"{interval['tar']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"
  assert shown in page.text
  mean = scores_report.mean_over_sets(_rows(workdir)[2:])
  assert f"{mean['accuracy_mean']:.4f}" in page.text
  assert re.search(r"--margin\s*0.31", page.text)
  assert "Trained so far: step 5000." in page.text
  assert len(page.all("figure")) == len(page.all("figcaption")) == 6 + 2 * 3
  assert not page.all("script")
  assert not page.all("link")
  for image in page.all("img"):
    assert str(image["src"]).startswith(("data:image/svg+xml;", "data:image/jpeg;"))
    assert image["alt"]


def test_what_comes_from_data_is_text_and_no_markup(workdir: pathlib.Path):
  content = report_page.page(report_page.read_run(str(workdir)))
  page = Outline(content)
  assert NAME in page.text
  assert NAME in [image["alt"] for image in page.all("img")]
  assert "cfp <i>, step 200" in page.text
  assert not page.all("i")
  assert "<script" not in content


def test_the_step_and_the_faces_are_chosen(workdir: pathlib.Path, capsys):
  output = workdir / "other.html"
  settings = report.ReportConfig(str(workdir), str(output), step=100, faces=False)
  assert report.main(settings) == errors.ExitCode.DONE
  assert capsys.readouterr().out == f"{output}\n"
  assert "lfw, step 100" in output.read_text()
  assert "image/jpeg" not in output.read_text()
  assert not (workdir / "report.html").exists()
  with pytest.raises(errors.DataError, match=r"--step=3 .*; choose one of 100, 200\."):
    report.main(dataclasses.replace(settings, step=3))
  with pytest.raises(errors.UsageError, match=r"must end in \.html"):
    report.main(dataclasses.replace(settings, output=str(workdir / "metrics.jsonl")))


def test_a_run_in_a_bucket_is_reported_there(workdir: pathlib.Path, bucket):
  for path in filter(pathlib.Path.is_file, workdir.rglob("*")):
    name = path.relative_to(workdir).as_posix()
    storage.write_bytes(f"gs://faces/run/{name}", path.read_bytes())
  path = report_page.write("gs://faces/run")
  assert path == "gs://faces/run/report.html"
  page = Outline(storage.read_bytes(path).decode())
  expected = Outline(report_page.page(report_page.read_run(str(workdir))))
  assert page.text == expected.text.replace(str(workdir), "gs://faces/run")
  assert len(page.all("img")) == len(expected.all("img"))


def test_groups_have_a_table(workdir: pathlib.Path):
  rows = _rows(workdir)
  group = {"group": "<b>", "num_pairs": 7, "accuracy": 0.25, "tar_at_far": [0.5, None]}
  rows[2]["by_group"] = {"far_limits": [0.1, 0.01], "groups": [group]}
  rows[2]["by_group"] |= {"largest_accuracy_gap": 0.0, "largest_tar_gaps": [0.125, 0]}
  (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
  page = Outline(report_page.page(report_page.read_run(str(workdir))))
  assert re.search(r"<b>\s*7\s*0\.2500\s*0\.5000\s*–", page.text)
  assert re.search(r"largest gap\s*0\.0000\s*0\.1250", page.text)


@pytest.mark.parametrize(
  ("missing", "says"),
  [
    ("metrics.jsonl", "run python -m facedist.evaluate --workdir="),
    ("train_metrics.jsonl", "run python -m facedist.train --workdir="),
    ("config.json", "there is no config.json"),
    ("evaluation", "the file with the pairs' scores is missing or broken"),
  ],
)
def test_a_part_that_is_missing_is_said_and_the_rest_is_shown(
  workdir: pathlib.Path, missing: str, says: str
):
  path = workdir / missing
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  page = Outline(report_page.page(report_page.read_run(str(workdir))))
  assert says in page.text
  assert page.all("h2")


def test_a_folder_without_a_run_is_refused(tmp_path: pathlib.Path):
  with pytest.raises(errors.DataError, match=r"holds no run: .* spelling of --workdir"):
    report_page.read_run(str(tmp_path))


def test_scores_of_a_set_that_was_rebuilt_and_of_another_way_are_apart(
  workdir: pathlib.Path,
):
  _score(workdir, 300, "lfw", fingerprint="bb")
  _score(workdir, 300, "lfw", mirrored=False, weights="ema")
  series = report_page.read_run(str(workdir)).series
  assert [(each.name, [row["step"] for row in each.rows]) for each in series] == [
    ("cfp <i>", [100, 200]),
    ("lfw", [300]),
    ("lfw, ema weights, without mirror images", [300]),
  ]


def test_steps_that_have_no_score_are_listed(workdir: pathlib.Path):
  lines = [
    json.dumps({"step": step, "set": "lfw", "reason": "skipped"}) for step in (100, 150)
  ]
  (workdir / "unscored.jsonl").write_text("\n".join(lines) + "\n")
  with open(workdir / "metrics.jsonl", "a") as stream:
    stream.write('{"of": "another tool"}\n')
  page = Outline(report_page.page(report_page.read_run(str(workdir))))
  assert "Without a score: lfw: steps 150 skipped." in page.text


def test_a_broken_network_still_has_a_map(workdir: pathlib.Path):
  row = _rows(workdir)[2]
  (path,) = score_details.find(str(workdir), [row]).values()
  details = score_details.load(path)
  same = dataclasses.replace(details, map_points=0 * details.map_points)
  score_details.save(same, str(workdir))
  assert "Map of some" in report_page.page(report_page.read_run(str(workdir)))


def test_a_writer_draws_the_newest_page_and_tensorboards_pictures(
  workdir: pathlib.Path, caplog: pytest.LogCaptureFixture
):
  from tensorboard.backend.event_processing import event_accumulator

  board = scores_report.TensorBoard(str(workdir / "events"))
  with report_page.ReportWriter(str(workdir), board) as writer:
    for step in (300, 400):
      row = _score(workdir, step, "lfw")
      (path,) = score_details.find(str(workdir), [row]).values()
      writer.draw_pictures(row, score_details.load(path))
      writer.draw_page()
  assert "lfw, step 400" in (workdir / "report.html").read_text()
  assert not caplog.records
  events = event_accumulator.EventAccumulator(str(workdir / "events"), {"tensors": 0})
  events.Reload()
  names = ("scores", "embedding_map", "false_accepts", "false_rejects")
  assert set(events.Tags()["tensors"]) == {f"lfw/{name}" for name in names}
  steps = [event.step for event in events.Tensors("lfw/embedding_map")]
  assert steps == [300, 400]
  (workdir / "config.json").write_text("[")
  with report_page.ReportWriter(str(workdir), board) as writer:
    writer.draw_page()
  assert "config.json is no JSON object" in caplog.text


def test_chromium_shows_it_without_errors_requests_or_sideways_scrolling(
  workdir: pathlib.Path, tmp_path: pathlib.Path
):
  if CHROMIUM is None:
    pytest.skip("there is no Chromium; apt-get install chromium")
  page = report_page.page(report_page.read_run(str(workdir)))
  widths = (360, 1280)  # in frames, because a window has at least 500 pixels
  frames = "".join(
    f'<iframe width={width} height=800 frameborder=0 srcdoc="{html.escape(page)}">'
    "</iframe>"
    for width in widths
  )
  probe = tmp_path / "probe.html"
  probe.write_text(f"<!doctype html><script>{PROBE}</script>{frames}")
  result = subprocess.run(
    [
      *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
      *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"),
      *("--dump-dom", probe.as_uri()),
    ],
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  found = json.loads(re.sub(r"<[^>]+>", "", result.stdout))
  images = {"images": page.count("<img "), "broken": 0}
  assert found == [
    {"width": width, "scroll_width": width, "requests": []} | images for width in widths
  ]
  assert "CONSOLE" not in result.stderr


def _rows(workdir: pathlib.Path) -> list[scores_report.Row]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]
