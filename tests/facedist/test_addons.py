"""facedist.addons."""

import subprocess
import sys

import numpy as np
import pytest

from facedist import addons, errors


def test_addons_are_imported_when_asked_for_and_silently():
  program = (
    "import sys\n"
    "from facedist import addons\n"
    "print('tensorflow_addons' in sys.modules)\n"
    "print(addons.load().__version__)\n"
  )
  run = subprocess.run(
    [sys.executable, "-c", program], check=True, capture_output=True, text=True
  )
  assert run.stdout.split() == ["False", "0.23.0"]
  assert run.stderr == ""


def test_addons_run_with_this_tensorflow():
  loss = addons.load().losses.triplet_hard_loss(
    y_true=np.array([0, 0, 1]),
    y_pred=np.array([[0.0, 1.0], [0.6, 0.8], [1.0, 0.0]], np.float32),
    margin=0.5,
  )
  # Distances: same pair sqrt(0.4), others sqrt(2) and sqrt(0.8). The batch-hard loss
  # of the three anchors, the third without a positive, is their mean.
  same, far, near = 0.4**0.5, 2**0.5, 0.8**0.5
  hinges = [max(0.0, same - far + 0.5), same - near + 0.5, max(0.0, 0 - near + 0.5)]
  np.testing.assert_allclose(loss, np.mean(hinges), rtol=1e-5)


def test_missing_addons_are_an_error_with_the_fix(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setitem(sys.modules, "tensorflow_addons", None)
  with pytest.raises(errors.UsageError, match=r"install tensorflow-addons==0\.23\.0"):
    addons.load()
