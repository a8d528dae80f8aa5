"""facedist.addons, and what is left where tensorflow_addons is not installed."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from facedist import addons, errors

HERE = pathlib.Path(__file__).parent
# Fast, and of every room that a run goes through; the last goes through all of them.
CORE = (
  "test_config.py",
  "data/test_tfrecord.py",
  "models/test_margins.py",
  "models/test_running_stats.py",
  "training/test_head_settings.py",
  "training/test_loss_scale.py",
  "training/test_metrics.py",
  "training/test_phases.py",
  "digits_job.py",
)


def test_addons_are_imported_when_asked_for_and_silently():
  program = (
    "import sys\n"
    "from facedist import addons\n"
    "print('tensorflow_addons' in sys.modules)\n"
    "addons.get('lamb')\n"
    "print(sys.modules['tensorflow_addons'].__version__)\n"
  )
  run = subprocess.run(
    [sys.executable, "-c", program], check=True, capture_output=True, text=True
  )
  assert run.stdout.split() == ["False", "0.23.0"]
  assert run.stderr == ""


def test_addons_run_with_this_tensorflow():
  loss = addons.get("triplet_hard")(
    y_true=np.array([0, 0, 1]),
    y_pred=np.array([[0.0, 1.0], [0.6, 0.8], [1.0, 0.0]], np.float32),
    margin=0.5,
  )
  # Distances: same pair sqrt(0.4), others sqrt(2) and sqrt(0.8). The batch-hard loss
  # of the three anchors, the third without a positive, is their mean.
  same, far, near = 0.4**0.5, 2**0.5, 0.8**0.5
  hinges = [max(0.0, same - far + 0.5), same - near + 0.5, max(0.0, 0 - near + 0.5)]
  np.testing.assert_allclose(loss, np.mean(hinges), rtol=1e-5)


@pytest.mark.parametrize("name", addons.FEATURES)
def test_every_feature_of_the_table_is_there(name: str):
  assert callable(addons.get(name))


@pytest.mark.parametrize("name", addons.FEATURES)
def test_a_feature_without_addons_is_an_error_with_the_fix_in_one_line(
  name: str, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setitem(sys.modules, "tensorflow_addons", None)
  with pytest.raises(
    errors.UsageError,
    match=r"install tensorflow-addons==0\.23\.0 with tensorflow==2\.15\.1, or take ",
  ) as error:
    addons.get(name)
  assert str(error.value).startswith(f"{addons.FEATURES[name].wanted} needs ")
  assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_core_of_the_suite_passes_where_addons_cannot_be_imported():
  program = (
    "import sys, pytest\n"
    "sys.modules['tensorflow_addons'] = None\n"
    "sys.exit(pytest.main(sys.argv[1:]))\n"
  )
  run = subprocess.run(
    [sys.executable, "-c", program, "-qx", "-pno:cacheprovider"]
    + [str(HERE / name) for name in CORE],
    cwd=HERE.parents[1],
    capture_output=True,
    text=True,
    timeout=280,
    check=False,
  )
  assert run.returncode == 0, run.stdout
  assert " skipped" not in run.stdout
