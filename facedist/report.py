"""Draws the report of a run: one HTML page that needs no network and no script.

  python -m facedist.report --workdir=/runs/a

It writes /runs/a/report.html, as facedist.evaluate does after each checkpoint, from
what the workdir holds: accuracy, loss, learning rate and input wait over the steps; for
each verification set ROC, histograms, groups, the hardest false accepts and false
rejects with their images, and a map of embeddings; and the run's config, data and
versions. It reads neither a verification set nor a checkpoint's weights. The page says
what is missing and how to get it. While training and evaluation go on, it shows them as
far as they are.

  --output=/tmp/a.html   writes the page there; it may be in a bucket (gs://...)
  --step=1200            shows the pairs of this step instead of the newest
  --nofaces              leaves out the face images, so that the page may be passed on
"""

import dataclasses

from facedist import config, errors, storage
from facedist.config import setting
from facedist.evaluation import report_page


@dataclasses.dataclass(frozen=True)
class ReportConfig:
  """Which run is reported, and where to."""

  workdir: str = setting(help="Folder of the training run.", path=True)
  output: str | None = setting(
    None,
    help="The HTML page, which is replaced; report.html in the workdir if not given.",
    path=True,
  )
  step: int | None = setting(
    None,
    help="Step whose pairs are shown; the newest score of each set if not given.",
    at_least=0,
  )
  faces: bool = setting(True, help="Whether the page shows face images.")


def main(settings: ReportConfig) -> int:
  """Draws the page and prints its path."""
  storage.check_file(settings.output, flag="output")
  if settings.output is not None and not settings.output.endswith(".html"):
    raise errors.UsageError(
      f"--output={settings.output} must end in .html, because a page of that name is "
      "replaced; rename it."
    )
  path = report_page.write(
    settings.workdir, settings.output, step=settings.step, faces=settings.faces
  )
  print(path, flush=True)
  return errors.ExitCode.DONE


def run() -> None:
  """Runs the command line."""
  config.run_command(main, ReportConfig)


if __name__ == "__main__":
  run()
