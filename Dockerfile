# syntax=docker/dockerfile:1
# Two images from one wheel:
#   docker build --target gateway -t expertmesh:0.1.0 .            gateway and router; no Ray, CPU
#   docker build --target experts -t expertmesh-experts:0.1.0 .    Ray and the expert groups
# torch is not in the lock files, as its builds differ: what `pip` finds by default on Linux computes
# on NVIDIA GPUs. For an image of the gateway without gigabytes of CUDA, give TORCH_INDEX the address
# of PyTorch's index of CPU builds.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS wheel
WORKDIR /src
COPY docker/requirements-build.txt docker/
RUN pip install --no-cache-dir --require-hashes -r docker/requirements-build.txt
COPY pyproject.toml README.md LICENSE ./
COPY services services
COPY router router
COPY experts experts
COPY protos protos
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${BASE} AS gateway-venv
ARG TORCH_INDEX=""
ARG TORCH=2.13.0
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY docker/requirements-gateway.txt /tmp/
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --no-deps --require-hashes -r /tmp/requirements-gateway.txt \
 && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==${TORCH}"
COPY --from=wheel /wheels /wheels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --no-deps /wheels/*.whl

FROM ${BASE} AS experts-venv
ARG TORCH=2.13.0
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY docker/requirements-experts.txt /tmp/
RUN pip install --no-cache-dir --no-deps --require-hashes -r /tmp/requirements-experts.txt \
 && pip install --no-cache-dir "torch==${TORCH}"
COPY --from=wheel /wheels /wheels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --no-deps /wheels/*.whl

FROM ${BASE} AS gateway
LABEL org.opencontainers.image.title="expertmesh" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=gateway-venv /opt/venv /opt/venv
COPY examples/demo-moe /opt/expertmesh/demo-moe
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    HOME=/tmp
USER 10001:10001
ENTRYPOINT ["expertmesh"]
CMD ["--help"]

FROM ${BASE} AS experts
LABEL org.opencontainers.image.title="expertmesh-experts" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# what KubeRay's probes and start commands run: bash, wget, grep, ps
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends bash grep procps wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --create-home --shell /bin/bash mesh
COPY --from=experts-venv /opt/venv /opt/venv
COPY examples/demo-moe /opt/expertmesh/demo-moe
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
# no entry point: KubeRay starts Ray with commands of its own
CMD ["bash"]
