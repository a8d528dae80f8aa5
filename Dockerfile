# docker build --build-arg TENSORFLOW=2.21 --build-arg VARIANT=gpu --tag facedist:gpu .
# cpu is the default; gpu adds CUDA's libraries, the node brings the driver. 2.15 is the
# default; 2.21 is for GPUs newer than Ampere (docs/launch.md).
ARG TENSORFLOW=2.15
FROM python:3.11-slim-bookworm AS tensorflow-2.15
FROM python:3.13-slim-bookworm AS tensorflow-2.21

FROM tensorflow-${TENSORFLOW}
ARG TENSORFLOW
ARG VARIANT=cpu

# An init passes signals on and reaps; Python as the first process would ignore them.
RUN apt-get update \
  && apt-get install --yes --no-install-recommends tini \
  && rm -rf /var/lib/apt/lists/* \
  && useradd --uid 1000 --no-create-home facedist

# What is installed depends on these alone, so that other changes leave this layer.
WORKDIR /opt/facedist
COPY setup.py pyproject.toml README.md ./
COPY requirements requirements
COPY facedist/__init__.py facedist/
COPY tfrecords_tools/__init__.py tfrecords_tools/
RUN case "$VARIANT" in \
    cpu) extras= ;; \
    gpu) extras="[gpu]" ;; \
    *) echo "VARIANT=$VARIANT must be cpu or gpu" >&2; exit 1 ;; \
  esac \
  && FACEDIST_TENSORFLOW="$TENSORFLOW" pip install --no-cache-dir \
    --constraint "requirements/tensorflow-$TENSORFLOW.txt" --editable ".$extras"

COPY facedist facedist
COPY tfrecords_tools tfrecords_tools
COPY configs configs

# The root file system may be read-only: all that is written at run time is in /tmp.
ENV HOME=/tmp \
  MPLCONFIGDIR=/tmp/matplotlib \
  PYTHONDONTWRITEBYTECODE=1 \
  PYTHONUNBUFFERED=1
USER 1000:1000
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "facedist.train", "--help"]
