"""facedist: distributed training of face-embedding networks with TensorFlow."""

import importlib.util
import os

__version__ = "0.1.0"

# TensorFlow reads these when it, or its Keras, is imported, so they are set here: the
# only work that is done at import.

# TensorFlow 2.15 prints three errors about CUDA plug-ins registered twice on every
# import, on every machine; its real errors also reach Python as exceptions. Set
# TF_CPP_MIN_LOG_LEVEL=0 to see everything.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# From 2.16 on tf.keras is Keras 3, unless this asks for Keras 2 (tf-keras). It is read
# at the first use of tf.keras, so it also serves a program that imports TensorFlow
# before facedist. config.run_command refuses a Keras 3 that was there first.
if importlib.util.find_spec("tf_keras"):
  os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
else:  # inherited from another environment, it would leave TensorFlow without a Keras
  os.environ.pop("TF_USE_LEGACY_KERAS", None)
