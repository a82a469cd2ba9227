# dpo-peft on a GPU of the host:
#   docker build -t dpo-peft .
#   docker run --rm --gpus all -v dpo-peft-cache:/cache -v "$PWD":/data dpo-peft train --config run.yaml
# The base has no CUDA: torch brings the libraries that it was built with, and the host gives the driver (550 or later).
FROM python:3.11-slim-trixie AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY recipes recipes
COPY dpo_peft dpo_peft
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist -c constraints.txt .

FROM python:3.11-slim-trixie
# Triton compiles the launchers of its kernels on first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    pip install --no-cache-dir -c /tmp/constraints.txt /dist/*.whl
# Whoever runs it may be another user (--user): what is written goes to /cache and /data, and /cache is open.
RUN useradd --create-home --uid 1000 dpo && install -d -m 1777 /cache && install -d -o dpo -g dpo /data
ENV HF_HOME=/cache/huggingface \
    DPO_PEFT_CACHE=/cache/dpo-peft \
    TRITON_CACHE_DIR=/cache/triton \
    MPLCONFIGDIR=/cache/matplotlib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
VOLUME /cache
USER 1000
WORKDIR /data
ENTRYPOINT ["dpo-peft"]
CMD ["help"]
