"""What a user sees first: --help of every command, and no noise from TensorFlow."""

import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

from tests import processes
from tests.test_paths_of_flags import MODULES

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = [module for module in MODULES if not module.startswith("launch.")]
TENSORFLOW = """
import facedist
import tensorflow as tf

@tf.function
def compiled(x):
  return tf.reduce_sum(x * x)

layer = tf.keras.layers.Dense(1, kernel_initializer="ones")
dataset = tf.data.Dataset.range(4).batch(2)
print(float(compiled(tf.ones([2, 2]))), float(layer(tf.ones([1, 3]))[0, 0]))
print([batch.tolist() for batch in dataset.as_numpy_iterator()])
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
  """Runs Python in the repository to its end."""
  done = subprocess.run(
    [sys.executable, *arguments], cwd=ROOT, check=False, capture_output=True, text=True
  )
  done.stderr = processes.without_notices(done.stderr)
  return done


@pytest.mark.parametrize("module", COMMANDS)
def test_help_teaches_by_an_example_and_prints_nothing_else(module: str):
  helped = processes.run(module, "--help")
  assert helped.returncode == 0
  teaching = inspect.getdoc(importlib.import_module(module)) or ""
  assert helped.stderr.startswith(f"{teaching}\n\n")
  assert f"python -m {module} " in teaching
  assert "\n  --" in helped.stderr
  assert max(map(len, helped.stderr.splitlines())) <= 88


@pytest.mark.parametrize("module", COMMANDS)
def test_an_unknown_flag_is_one_line_and_exit_code_2(module: str):
  failed = processes.run(module, "--no_such_flag=1")
  assert failed.returncode == 2
  (line,) = failed.stderr.splitlines()
  assert line.startswith("error: ")
  assert "no_such_flag" in line


def test_tensorflow_starts_without_a_word():
  quiet = run("-c", TENSORFLOW)
  assert quiet.stdout == "4.0 3.0\n[[0, 1], [2, 3]]\n"
  assert quiet.stderr == ""


def test_the_choice_of_keras_of_another_environment_does_no_harm():
  program = (
    "import os; os.environ['TF_USE_LEGACY_KERAS'] = '1'\n"
    "import facedist, importlib.util, tensorflow as tf\n"
    "tf.keras.layers.Dense(1)\n"
    "has_keras_2 = importlib.util.find_spec('tf_keras') is not None\n"
    "print(('TF_USE_LEGACY_KERAS' in os.environ) == has_keras_2)\n"
  )
  assert run("-c", program).stdout == "True\n"


def test_a_keras_3_that_was_imported_first_is_one_line_and_exit_code_2():
  program = (
    "import sys, types\n"
    "from facedist import train\n"
    "import tensorflow as tf\n"
    "tf.__dict__['keras'] = types.SimpleNamespace(__version__='3.15.1')\n"
    "tf.__version__ = '2.21.0'\n"
    "sys.argv = ['train', '--data_dir=/no', '--workdir=/no']\n"
    "train.run()\n"
  )
  failed = run("-c", program)
  assert (failed.returncode, failed.stdout) == (2, "")
  (line,) = failed.stderr.splitlines()
  assert line == (
    "error: tf.keras is Keras 3.15.1, and facedist needs Keras 2: install "
    "tf-keras==2.21.* and leave TF_USE_LEGACY_KERAS unset, or 1."
  )


def test_importing_a_package_touches_no_library():
  program = (
    "import sys, facedist, tfrecords_tools, facedist.data, facedist.models\n"
    "print(sorted({'tensorflow', 'numpy', 'cv2', 'google'} & set(sys.modules)))"
  )
  assert run("-c", program).stdout == "[]\n"
