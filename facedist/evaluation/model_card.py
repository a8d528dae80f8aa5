"""A model card: a page of Markdown that says what an exported network is and is not.

It has the sections that "Model Cards for Model Reporting" (arXiv:1810.03993) asks for,
as far as a run's folder has an answer: scores come from its metrics.jsonl. It shows no
image and names no person.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from facedist import errors, storage
from facedist.data.shards import manifest
from facedist.evaluation import score_log
from facedist.evaluation.score_log import Row
from facedist.training.config import TrainConfig

_ALWAYS = ("backbone", "embedding_size", "head", "margin", "scale", "optimizer")
_LIMITS = """\
It must not be used

- to decide about a person by itself, such as about access, work, money or arrest: it
  accepts strangers and refuses the right person, at the rates below or at worse ones;
- to find or follow people who did not agree to it, or where the law does not allow it;
- to infer race, sex, age, feelings, health, character or anything else but whether two
  images may show one person;
- on images that are not aligned as described below, or at a threshold that was not
  measured on images like those it is used on;
- for a group of people on whom it was not measured: a group that is not in a table of
  this page was not;
- where the licence of its training images does not allow it. Many sets of faces are
  for research only, and so are networks trained on them.
"""


@dataclasses.dataclass(frozen=True)
class ModelCard:
  """What a card says.

  Attributes:
    facts: Those that the export writes with the model, see facedist.export.
    usage: Markdown: how pixels go in and embeddings come out.
    run: The configuration of the training run.
    data: What is known of the training data, by name.
    rows: The rows of metrics.jsonl that belong to the exported weights.
    model_rows: Rows of the same form that the exported model itself got.
    versions: Versions of the libraries that wrote the model, by name.
    sha256: SHA-256 of each file of the model, by name.
  """

  facts: Mapping[str, Any]
  usage: str
  run: TrainConfig
  data: Mapping[str, Any]
  rows: Sequence[Row]
  versions: Mapping[str, str]
  sha256: Mapping[str, str]
  model_rows: Sequence[Row] = ()

  def markdown(self) -> str:
    """Returns the page."""
    facts = self.facts
    name = f"{facts['model']}, step {facts['step']}"
    parts = [
      f"# Model card: {name}",
      "This network maps the image of an aligned face to an embedding. The cosine of "
      "two embeddings says how likely the images show one person. It was exported with "
      f"facedist {facts['tool_version']}.",
      "## What it must not be used for",
      _LIMITS,
      "## Input and output",
      self.usage,
      _alignment(facts),
      "## Training data",
      _bullets(self.data),
      "## Configuration",
      "Settings that are not listed have the defaults of that version.",
      _bullets(_settings(self.run)),
      "## Scores of the checkpoint",
      self._scores(),
      *self._scores_of_model(),
      "## Provenance",
      _table(
        ("what", "value"),
        [(key, _text(value)) for key, value in self._provenance().items()],
      ),
      *self._provenance_of_scores(),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"

  def _scores(self) -> str:
    """Returns the tables of `rows`."""
    if not self.rows:
      return (
        "**Not measured.** The run's metrics.jsonl has no score of this step and these "
        "weights: evaluate it with `python -m facedist.evaluate`, then export again."
      )
    said = (
      "By `python -m facedist.evaluate`, before the export: accuracy over the folds, "
      "each with the threshold of the others, and TAR at FAR with 95 % intervals."
    )
    return "\n\n".join([said, score_tables(self.rows)])

  def _scores_of_model(self) -> list[str]:
    """Returns the section of `model_rows`; nothing if there is none."""
    if not self.model_rows:
      return []
    return [
      "## Scores of this exported model",
      "The model itself embedded the images, after it was exported.",
      score_tables(self.model_rows),
    ]

  def _provenance(self) -> dict[str, Any]:
    """Returns hashes and versions."""
    elsewhere = {"model", "step", "signatures", "tool_version"}
    return {
      **{key: value for key, value in self.facts.items() if key not in elsewhere},
      "facedist": self.facts["tool_version"],
      **self.versions,
      **{f"SHA-256 of {name}": digest for name, digest in self.sha256.items()},
    }

  def _provenance_of_scores(self) -> list[str]:
    """Returns what the rows say of their own provenance."""
    rows = [*self.rows, *self.model_rows]
    return [
      f"Of the score on {row['set']}:\n\n"
      f"```json\n{json.dumps(row['provenance'], indent=1)}\n```"
      for row in rows
      if "provenance" in row
    ]


def score_tables(rows: Sequence[Row]) -> str:
  """Returns Markdown tables of rows of metrics.jsonl: by set, by FAR and by group."""
  by_set = _table(
    ("set", "pairs", "mirrored", "accuracy", "AUC", "EER"),
    [
      (
        row["set"],
        str(row["num_pairs"]),
        "yes" if row["mirrored"] else "no",
        f"{row['accuracy_mean']:.4f} ± {row['accuracy_std']:.4f}",
        f"{row['auc']:.4f}",
        f"{row['eer']:.4f}",
      )
      for row in rows
    ],
  )
  by_far = _table(
    ("set", "FAR", "TAR", "95 % interval", "threshold (cosine)"),
    [
      (
        row["set"],
        f"{at['far']:g}",
        f"{at['tar']:.4f}",
        "" if at["low"] is None else f"{at['low']:.4f} to {at['high']:.4f}",
        f"{at['threshold']:.4f}" if "threshold" in at else "",
      )
      for row in rows
      for at in row.get("tar_at_far", ())
    ],
  )
  note = "A threshold holds for embeddings made as `mirrored` says, and for no others."
  tables = [
    by_set,
    by_far,
    note,
    *(_by_group(row) for row in rows if "by_group" in row),
  ]
  return "\n\n".join(tables)


def rows_of(workdir: str, *, step: int, weights: str) -> list[Row]:
  """Returns the rows of metrics.jsonl of a checkpoint's weights, the last of each set.

  Args:
    workdir: The run's folder.
    step: Step of the checkpoint.
    weights: trained or ema.
  """
  rows = score_log.read_rows(storage.join(workdir, score_log.SCORE_LOG_NAME))
  last = {
    (row["set"], row["mirrored"]): row
    for row in rows
    if (row.get("step"), row.get("weights", "trained")) == (step, weights)
  }
  return list(last.values())


def data_facts(run: TrainConfig, marker: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what is known of the training data.

  Args:
    run: Its data_dir is read if it still has the data that the marker names.
    marker: Of the checkpoint.
  """
  known = {
    "identities": marker.get("num_identities"),
    "image size in pixels": marker.get("image_size"),
    "alignment template": marker.get("alignment") or "not known",
    "fingerprint": marker.get("data_fingerprint"),
  }
  try:
    content = manifest.load(run.data_dir or "")
  except errors.FacedistError:  # the data may have moved or been deleted
    return known
  if content.fingerprint != marker.get("data_fingerprint"):
    return known
  images = {f"{name} images": split.records for name, split in content.splits.items()}
  return {"data set": content.dataset, **images, **known}


def _by_group(row: Row) -> str:
  """Returns the table of a row's groups, and the largest gaps."""
  groups = row["by_group"]
  limits = [f"{far:g}" for far in groups["far_limits"]]
  table = _table(
    ("group", "pairs", "accuracy", *(f"TAR at FAR {far}" for far in limits)),
    [
      (
        each["group"],
        str(each["num_pairs"]),
        f"{each['accuracy']:.4f}",
        *("" if tar is None else f"{tar:.4f}" for tar in each["tar_at_far"]),
      )
      for each in groups["groups"]
    ],
  )
  return (
    f"Groups of {row['set']}, all at the same thresholds; the largest gap in accuracy "
    f"is {groups['largest_accuracy_gap']:.4f}:\n\n{table}"
  )


def _settings(run: TrainConfig) -> dict[str, Any]:
  """Returns the settings that decide what is trained and are not the defaults."""
  return {
    field.name: os.path.basename(value) if field.metadata["path"] else value
    for field in dataclasses.fields(run)
    if (value := getattr(run, field.name)) is not None
    and not field.metadata["may_change"]
    and (field.name in _ALWAYS or value != field.default)
  }


def _alignment(facts: Mapping[str, Any]) -> str:
  """Returns how images must be cut."""
  size = facts["image_size"]
  template = facts["alignment"]
  how = f"the template {template}" if template else "a template that is not known"
  return (
    f"No face is looked for. An image must show one face, be {size} × {size} pixels, "
    f"and be aligned by five landmarks as the training images were: by {how}."
  )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Returns a Markdown table."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(values: Mapping[str, Any]) -> str:
  """Returns a Markdown list."""
  return "\n".join(f"- {name}: {_text(value)}" for name, value in values.items())


def _text(value: Any) -> str:
  """Returns a value as a reader expects it."""
  if value is None:
    return "not known"
  return f"{value:,}" if type(value) is int else str(value)
