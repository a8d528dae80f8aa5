"""Installs facedist and its commands.

There are two lanes of TensorFlow, and Python decides: 2.15 on Python 3.11 (the
reference), 2.21 on 3.12 and 3.13. FACEDIST_TENSORFLOW=2.21 chooses 2.21 on Python 3.11
too. requirements/ has a constraint file for each.
"""

import os
import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
INIT = (ROOT / "facedist/__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.M)[1]

LANES = {
  "2.15": {
    # The last TensorFlow that tensorflow-addons, whose development has ended, runs on.
    "core": [
      "tensorflow==2.15.1",
      "tensorflow-addons==0.23.0",
      "numpy>=1.26,<2",
      "protobuf>=4.22,<5",
    ],
    "dev": ["tensorboard>=2.15,<2.16"],
    "gpu": ["tensorflow[and-cuda]==2.15.1"],
    "onnx": ["onnx>=1.17,<1.19"],  # later: ml-dtypes 0.5
  },
  "2.21": {
    "core": [
      "tensorflow>=2.21,<2.22",
      "tf-keras>=2.21,<2.22",  # Keras 2; TensorFlow's own is Keras 3
      "numpy>=1.26,<3",
      "protobuf>=6.31.1,<8",
    ],
    "dev": ["tensorboard>=2.20,<2.22"],
    "gpu": ["tensorflow[and-cuda]>=2.21,<2.22"],
    "onnx": ["onnx>=1.19,<2"],
  },
}

FIND_FACES = ["mtcnn>=1.0,<2"]
LARGE_GALLERIES = ["faiss-cpu>=1.8,<2"]  # facedist.search past a million
PARQUET = ["pyarrow>=21,<22"]  # embed --output=FILE.parquet; later: NumPy 2


def of_lanes(group: str) -> list[str]:
  """Returns a group's requirements: of the chosen lane, else each where its Python is.

  Raises:
    SystemExit: FACEDIST_TENSORFLOW names no lane.
  """
  chosen = os.environ.get("FACEDIST_TENSORFLOW")
  if not chosen:
    old = [f'{each}; python_version < "3.12"' for each in LANES["2.15"][group]]
    new = [f'{each}; python_version >= "3.12"' for each in LANES["2.21"][group]]
    return old + new
  if chosen not in LANES:
    raise SystemExit(f"FACEDIST_TENSORFLOW={chosen} must be 2.15 or 2.21.")
  return list(LANES[chosen][group])


EXPORT_ONNX = [
  *of_lanes("onnx"),
  "onnxruntime>=1.17,<2",  # every exported model is run before it is kept
  "tf2onnx>=1.16.1,<2",
]


setup(
  name="facedist",
  version=VERSION,
  description="Distributed training of face-embedding networks with TensorFlow",
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="MIT",
  classifiers=[
    "Development Status :: 4 - Beta",
    "Environment :: GPU :: NVIDIA CUDA",
    "Intended Audience :: Developers",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Topic :: Scientific/Engineering :: Image Recognition",
  ],
  python_requires=">=3.11,<3.14",
  packages=find_packages(include=["facedist*", "tfrecords_tools*"]),
  install_requires=[
    *of_lanes("core"),
    "absl-py>=2.0,<3",
    "google-api-core>=2.15,<3",
    "google-auth>=2.23,<3",
    "google-cloud-storage>=3.0,<4",
    "google-crc32c>=1.5,<2",
    "h5py>=3.10,<4",
    "matplotlib>=3.8,<4",
    # Both lanes decode alike; later ones read GIFs and need numpy 2.
    "opencv-python-headless>=4.8,<4.12",
    "requests>=2.31,<3",
    "scikit-learn>=1.3,<2",
    "scipy>=1.11,<2",
    "simplejpeg>=1.7,<2",
    "threadpoolctl>=3.1,<4",
    "tqdm>=4.66,<5",
    "urllib3>=1.26,<3",
  ],
  extras_require={
    "dev": [
      *of_lanes("dev"),
      *EXPORT_ONNX,
      *FIND_FACES,
      *PARQUET,
      *LARGE_GALLERIES,
      "cryptography>=41",  # a test server's certificate
      "gcp-storage-emulator==2026.7.19",
      "PyYAML>=6,<7",
      "hypothesis>=6.90,<7",
      "jsonschema>=4.20,<5",
      "kubernetes-validate>=1.37,<2",
      "mypy>=2.4,<2.5",  # a new mypy or ruff finds new faults in old code
      "packaging>=23",
      "pillow>=10",
      "pytest>=8,<10",
      "pytest-timeout>=2.2,<3",
      "pytest-xdist>=3.7,<4",  # `make test` runs two files at a time
      "ruff>=0.17,<0.18",
      "safetensors>=0.4,<1",
      "types-tqdm",
    ],
    "align": FIND_FACES,
    "faiss": LARGE_GALLERIES,
    "onnx": EXPORT_ONNX,
    "parquet": PARQUET,
    "fuzz": ["atheris>=3.0,<4"],  # `make fuzz`; the tests do without it
    "pytorch": [  # --backbone_weights=FILE of arcface_torch; either is enough
      "safetensors>=0.4,<1",
      "torch>=2.4,<3",
    ],
    "gpu": of_lanes("gpu"),
  },
  entry_points={
    "console_scripts": [
      "facedist-train=facedist.train:run",
      "facedist-evaluate=facedist.evaluate:run",
      "facedist-embed=facedist.embed:run",
      "facedist-export=facedist.export:run",
      "facedist-identify=facedist.identify:run",
      "facedist-compare=facedist.compare:run",
      "facedist-search=facedist.search:run",
      "facedist-report=facedist.report:run",
      "facedist-templates=facedist.templates:run",
      "facedist-doctor=facedist.doctor:run",
      "facedist-align=tfrecords_tools.align:run",
      "facedist-build-shards=tfrecords_tools.build:run",
      "facedist-select-shards=tfrecords_tools.select:run",
      "facedist-inspect-shards=tfrecords_tools.inspect:run",
      "facedist-verify-shards=tfrecords_tools.verify:run",
      "facedist-audit-overlap=tfrecords_tools.find_overlap:run",
      "facedist-index-shards=tfrecords_tools.rebuild_index:run",
      "facedist-synthetic-faces=tfrecords_tools.synthetic_faces:run",
    ]
  },
)
