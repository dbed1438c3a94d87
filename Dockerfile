# An image with rddm-dist, for CPUs or CUDA. It has not been built by the project's tests, which have no engine.
#   docker build -t rddm-dist:0.1.0 .
#   docker build -t rddm-dist:0.1.0-cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# DeepSpeed compiles a small operator: at build time here, and again where the machine differs. KubeRay before 1.6 asks
# pods how they are with wget.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ make wget \
 && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/rddm-dist
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY data_pipeline data_pipeline
COPY rddm_dist rddm_dist
COPY cluster cluster
COPY configs configs
RUN pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" -c constraints.txt '.[fast,s3]' \
 && useradd --create-home --uid 1000 rddm

USER rddm
WORKDIR /home/rddm
RUN python -c "from rddm_dist.training.engine import build_operators; build_operators()"
CMD ["rddm", "--help"]
