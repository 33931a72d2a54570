# Redline for CPUs, or for NVIDIA's GPUs with DEVICE=cuda:
#
#     docker build --tag redline:cpu .
#     docker build --tag redline:cuda --build-arg DEVICE=cuda .
#
# Versions of packages of Debian are those of its stable release.
# hadolint global ignore=DL3008

ARG DEVICE=cpu
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
ARG DEVICE
# An index with wheels of PyTorch without CUDA's libraries, which makes the image for CPUs several GB smaller; the wheels
# of pip's own index have them. PyTorch's installation page names one.
ARG CPU_TORCH_INDEX
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/redline/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/redline
WORKDIR /src

# PyTorch, then the other dependencies: layers that a change of the sources leaves as they are.
COPY versions/tested.txt versions/
RUN if [ "$DEVICE" = cpu ] && [ -n "${CPU_TORCH_INDEX:-}" ]; then \
        pip install --no-cache-dir --constraint versions/tested.txt --index-url "$CPU_TORCH_INDEX" torch; \
    else \
        pip install --no-cache-dir --constraint versions/tested.txt torch; \
    fi
COPY pyproject.toml deploy/requirements.py ./
RUN python requirements.py "$DEVICE" > requirements.txt \
    && pip install --no-cache-dir --constraint versions/tested.txt --requirement requirements.txt

# The wheel has the CPU kernels of every instruction set of the architecture, so the image needs no compiler for them.
COPY . .
RUN pip install --no-cache-dir --no-deps .

FROM ${PYTHON} AS runtime-cpu

FROM ${PYTHON} AS runtime-cuda
# Triton compiles the launchers of its kernels when they are first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM runtime-${DEVICE}
# tini is process 1: it passes signals on, and collects the processes that a Ray node leaves behind.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 redline \
    && install --directory --owner=redline --group=redline /home/redline/.cache
COPY --from=build /opt/redline /opt/redline
ENV PATH=/opt/redline/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/redline
# Models are fetched into this folder: keep it.
VOLUME /home/redline/.cache
EXPOSE 8000
ENTRYPOINT ["tini", "--"]
CMD ["redline", "--help"]
