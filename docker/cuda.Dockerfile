# keepwarm on NVIDIA GPUs: docker build -f docker/cuda.Dockerfile -t keepwarm:cuda .
# docker run --gpus all --ipc host --ulimit memlock=-1 keepwarm:cuda doctor
# The wheel of torch brings the libraries of CUDA; the driver is the host's. Not yet run on a GPU.
FROM python:3.11-slim-bookworm

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Triton compiles the launchers of its kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[hf,megatron]' \
    && useradd --uid 1000 --create-home keepwarm

USER 1000
WORKDIR /home/keepwarm
ENTRYPOINT ["keepwarm"]
CMD ["--help"]
