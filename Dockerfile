# Training on NVIDIA GPUs: docs/gpu.md says how to build and run it, and what of it was tried.
# The whole toolkit is needed: Transformer Engine's torch part is compiled here, and its kernels and
# Triton's launchers are when they first run.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential ninja-build python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# cuDNN and NCCL are torch's: another one loaded before them would be refused
ENV CUDNN_HOME=/opt/venv/lib/python3.12/site-packages/nvidia/cudnn
ENV CPATH=$CUDNN_HOME/include:/opt/venv/lib/python3.12/site-packages/nvidia/nccl/include \
    LD_LIBRARY_PATH=$CUDNN_HOME/lib
COPY dev/constraints.txt /tmp/constraints.txt
RUN python3.12 -m venv /opt/venv \
    && pip install --constraint /tmp/constraints.txt torch==2.11.0 setuptools wheel
# By itself, as it takes longest: a change of the code does not compile it again.
ENV MAX_JOBS=4 NVTE_FRAMEWORK=pytorch
RUN pip install --no-build-isolation --constraint /tmp/constraints.txt \
        'transformer-engine[pytorch,core_cu13]>=2.12,<2.13'

WORKDIR /home/nanofuse/clone
COPY pyproject.toml setup.py README.md LICENSE ./
COPY nanofuse nanofuse
COPY kernels kernels
COPY model model
COPY train train
COPY bench bench
RUN pip install --no-build-isolation --constraint /tmp/constraints.txt \
        --editable '.[fp8,attention,products,energy,hub,plot,wandb]'

# Data, tokens, compiled kernels and runs outlive a container in volumes.
RUN useradd --create-home --uid 10001 nanofuse \
    && mkdir -p /cache/nanofuse /cache/triton /cache/flash runs \
    && chown -R nanofuse:nanofuse /cache /home/nanofuse
ENV NANOFUSE_DIR=/cache/nanofuse TRITON_CACHE_DIR=/cache/triton \
    FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=/cache/flash
USER 10001
VOLUME ["/cache", "/home/nanofuse/clone/runs"]
ENTRYPOINT ["python", "-m", "train.run"]
