"""The report of a run of random scores: read as HTML, and opened in Chromium."""

import dataclasses
import html
import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest

from facedist import config, errors, report, storage
from facedist.evaluation import evaluator, report_page, score_details
from facedist.evaluation import report as scores_report
from facedist.training.config import TrainConfig
from tests.facedist.evaluation.test_scoring import PAIRS

NAME = 'a&b/<script>alert("x")</script>.jpg'
CHROMIUM = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
  None,
)
PROBE = """
addEventListener("load", () => {
  const windows = [...document.querySelectorAll("iframe")].map(e => e.contentWindow);
  const found = windows.map(({document, innerWidth, performance}) => ({
    width: innerWidth,
    scroll_width: document.documentElement.scrollWidth,
    images: document.images.length,
    broken: [...document.images].filter(each => !each.naturalWidth).length,
    requests: performance.getEntriesByType("resource").map(each => each.name)
      .filter(each => !/^data:/.test(each)),
  }));
  document.documentElement.textContent = JSON.stringify(found);
});
"""


def _text(page: str) -> str:
  """Returns what a page says."""
  return html.unescape(re.sub(r"<[^>]*>", "", page))


def _score(
  workdir: pathlib.Path, step: int, name: str, **more
) -> tuple[scores_report.Row, score_details.ScoreDetails]:
  """Adds a score of random pairs to a run, with its details."""
  rng = np.random.default_rng(step)
  labels = np.repeat(np.arange(10), 6)
  first, second = rng.integers(60, size=(2, 400))
  second[::2] = first[::2] // 6 * 6 + rng.integers(6, size=200)  # of one identity
  pairs = dataclasses.replace(
    PAIRS,
    read=lambda numbers: rng.integers(0, 255, (len(numbers), 32, 32, 3), np.uint8),
    read_names=lambda: [NAME, ""] * 30,
    first=first,
    second=second,
    same=labels[first] == labels[second],
    folds=np.arange(400) % 10,
    labels=labels,
  )
  embeddings = np.eye(12)[labels] + 0.6 * rng.normal(size=(60, 12))
  cosines, result = evaluator.verify_set(pairs, embeddings)
  key = {"step": step, "set": name, "fingerprint": "aa", "mirrored": True}
  key |= {"weights": "trained"} | more
  row = scores_report.row(
    result, key_fields=key, checkpoint=f"step-{step}", images=60, seconds=1.5
  )
  details = evaluator.details_of(key, pairs, embeddings, cosines, result)
  score_details.save(details, str(workdir))
  with (workdir / "metrics.jsonl").open("a") as stream:
    stream.write(json.dumps(row) + "\n")
  return row, details


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A run with everything that a page shows, and its page."""
  folder = tmp_path_factory.mktemp("runs") / "run"
  folder.mkdir()
  (folder / "config.json").write_text(config.to_json(TrainConfig(margin=0.31)))
  train = {"kind": "train", "accuracy": 0.5, "learning_rate": 0.1, "input_wait": 0.01}
  train |= {"images_per_second": 100.0, "losses": [0.0] * 10}
  log = [train | {"step": step, "loss": 9 / step} for step in range(10, 5010, 10)]
  log.append({"kind": "validation", "step": 5000, "loss": 1, "accuracy": 0.7})
  (folder / "train_metrics.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
  for step in (100, 200):
    _score(folder, step, "lfw")
    _score(folder, step, "cfp <i>")
  report_page.write(str(folder))
  return folder


@pytest.fixture
def workdir(run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A copy of the run, without a page."""
  without = shutil.ignore_patterns("report.html")
  return pathlib.Path(shutil.copytree(run, tmp_path / "run", ignore=without))


@pytest.fixture
def scores(run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A folder with the run's rows alone, whose page is drawn quickly."""
  (tmp_path / "scores").mkdir()
  return pathlib.Path(shutil.copy(run / "metrics.jsonl", tmp_path / "scores")).parent


def _page(workdir: pathlib.Path) -> str:
  """Returns what the page of a run says."""
  return _text(report_page.page(report_page.read_run(str(workdir))))


def test_the_page_shows_the_run_in_tables_and_pictures(run: pathlib.Path):
  page = (run / "report.html").read_text()
  text, rows = _text(page), _rows(run)
  lfw = [row for row in rows if row["set"] == "lfw"]
  for row in lfw:
    assert f"{row['accuracy_mean']:.4f} ± {row['accuracy_std']:.4f}" in text
  at = lfw[1]["tar_at_far"][1]
  assert f"{at['tar']:.4f} [{at['low']:.4f}, {at['high']:.4f}]" in text
  mean = scores_report.mean_over_sets(rows[2:])
  assert f"{mean['accuracy_mean']:.4f}" in text
  assert re.search(r"--margin\s*0.31", text)
  assert "Trained so far: step 5000." in text
  assert page.count("<figure>") == page.count("<figcaption>") == 6 + 2 * 3
  inside = r'<img src="data:image/(?:svg\+xml|jpeg);[^"]+" alt="[^"]+"'
  assert len(re.findall(inside, page)) == page.count("<img") > 6 + 2 * 3


def test_what_comes_from_data_is_text_and_no_markup(run: pathlib.Path):
  page = (run / "report.html").read_text()
  assert NAME in _text(page)
  assert NAME in map(html.unescape, re.findall(r' alt="([^"]*)"', page))
  assert "cfp <i>, step 200" in _text(page)
  for tag in ("<i>", "<script", "<link"):
    assert tag not in page


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


def test_a_run_in_a_bucket_is_reported_there(
  run: pathlib.Path, workdir: pathlib.Path, bucket
):
  for entry in storage.walk(str(workdir)):
    storage.upload(str(workdir / entry.path), f"{bucket}/run/{entry.path}")
  path = report_page.write(f"{bucket}/run")
  assert path == f"{bucket}/run/report.html"
  page, expected = storage.read_bytes(path).decode(), (run / "report.html").read_text()
  assert _text(page) == _text(expected).replace(str(run), f"{bucket}/run")
  assert page.count("<img") == expected.count("<img")


def test_groups_have_a_table(scores: pathlib.Path):
  rows = _rows(scores)
  group = {"group": "<b>", "num_pairs": 7, "accuracy": 0.25, "tar_at_far": [0.5, None]}
  rows[2]["by_group"] = {"far_limits": [0.1, 0.01], "groups": [group]}
  rows[2]["by_group"] |= {"largest_accuracy_gap": 0.0, "largest_tar_gaps": [0.125, 0]}
  (scores / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
  page = _page(scores)
  assert re.search(r"<b>\s*7\s*0\.2500\s*0\.5000\s*–", page)
  assert re.search(r"largest gap\s*0\.0000\s*0\.1250", page)


def test_parts_that_are_missing_are_said_and_the_others_are_shown(
  workdir: pathlib.Path, scores: pathlib.Path
):
  (workdir / "metrics.jsonl").unlink()
  trained, scored = _page(workdir), _page(scores)
  assert "run python -m facedist.evaluate --workdir=" in trained
  assert re.search(r"--margin\s*0.31", trained)
  assert "run python -m facedist.train --workdir=" in scored
  assert "there is no config.json" in scored
  assert "the file with the pairs' scores is missing or broken" in scored
  assert "★ best" in scored


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


def test_steps_that_have_no_score_are_listed(scores: pathlib.Path):
  skipped = {"set": "lfw", "reason": "skipped"}
  lines = [json.dumps({"step": step} | skipped) + "\n" for step in (100, 150)]
  (scores / "unscored.jsonl").write_text("".join(lines))
  with open(scores / "metrics.jsonl", "a") as stream:
    stream.write('{"of": "another tool"}\n')
  assert "Without a score: lfw: steps 150 skipped." in _page(scores)


def test_a_broken_network_still_has_a_map(tmp_path: pathlib.Path):
  _, details = _score(tmp_path, 100, "lfw")
  same = dataclasses.replace(details, map_points=0 * details.map_points)
  score_details.save(same, str(tmp_path))
  assert "Map of some" in _page(tmp_path)


def test_a_writer_draws_the_newest_page_and_tensorboards_pictures(
  tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
  from tensorboard.backend.event_processing import event_accumulator

  run, folder = str(tmp_path), str(tmp_path / "events")
  board = scores_report.TensorBoard(folder)
  with report_page.ReportWriter(run, board) as writer:
    for step in (300, 400):
      writer.draw_pictures(*_score(tmp_path, step, "lfw"))
      writer.draw_page()
  assert "lfw, step 400" in (tmp_path / "report.html").read_text()
  assert not caplog.records
  events = event_accumulator.EventAccumulator(folder, {"tensors": 0})
  events.Reload()
  names = ("scores", "embedding_map", "false_accepts", "false_rejects")
  assert set(events.Tags()["tensors"]) == {f"lfw/{name}" for name in names}
  steps = [event.step for event in events.Tensors("lfw/embedding_map")]
  assert steps == [300, 400]
  (tmp_path / "config.json").write_text("[")
  with report_page.ReportWriter(run, board) as writer:
    writer.draw_page()
  assert "config.json is no JSON object" in caplog.text


def test_chromium_shows_it_without_errors_requests_or_sideways_scrolling(
  run: pathlib.Path, tmp_path: pathlib.Path
):
  if CHROMIUM is None:
    pytest.skip("there is no Chromium; apt-get install chromium")
  page = (run / "report.html").read_text()
  widths = (360, 1280)  # in frames, because a window has at least 500 pixels
  frame = f'height=800 frameborder=0 srcdoc="{html.escape(page)}"></iframe>'
  frames = "".join(f"<iframe width={width} {frame}" for width in widths)
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
