"""Installs facedist and its commands."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
  r'^__version__ = "(.+)"$', (ROOT / "facedist/__init__.py").read_text(), re.M
)[1]

setup(
  name="facedist",
  version=VERSION,
  description="Distributed training of face-embedding networks with TensorFlow",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="MIT",
  python_requires=">=3.11,<3.12",
  packages=find_packages(include=["facedist*", "tfrecords_tools*"]),
  install_requires=[
    "tensorflow==2.15.1",
    "tensorflow-addons==0.23.0",
    "absl-py>=2.0,<3",
    "google-cloud-storage>=2.14,<4",
    "google-crc32c>=1.5,<2",
    "matplotlib>=3.8,<4",
    "numpy>=1.26,<2",
    "opencv-python-headless>=4.8,<4.12",
    "scikit-learn>=1.3,<2",
    "simplejpeg>=1.7,<2",
    "tqdm>=4.66,<5",
  ],
  extras_require={
    "dev": [
      "gcp-storage-emulator==2026.7.19",
      "hypothesis>=6.90",
      "mypy>=1.8",
      "pytest>=8",
      "pytest-timeout>=2.2",
      "ruff>=0.4",
      "types-tqdm",
    ],
    "gpu": ["tensorflow[and-cuda]==2.15.1"],
  },
  entry_points={
    "console_scripts": [
      "facedist-train=facedist.train:run",
      "facedist-evaluate=facedist.evaluate:run",
      "facedist-embed=facedist.embed:run",
      "facedist-build-shards=tfrecords_tools.build:run",
      "facedist-verify-shards=tfrecords_tools.verify:run",
      "facedist-synthetic-faces=tfrecords_tools.synthetic_faces:run",
    ]
  },
)
