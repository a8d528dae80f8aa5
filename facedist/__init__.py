"""facedist: distributed training of face-embedding networks with TensorFlow."""

import os

__version__ = "0.1.0"

# TensorFlow 2.15 prints three errors about CUDA plug-ins registered twice on every
# import, on every machine; its real errors also reach Python as exceptions. The
# level must stand before TensorFlow is imported, so it stands here; set
# TF_CPP_MIN_LOG_LEVEL=0 to see everything.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
