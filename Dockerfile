# Both images: `--target sidecar`, which goes into every governed pod, and `--target control-plane`.
# Neither holds pip, a compiler or what the other one needs; both run without root and with a read-only root file system.
# Where a registry must not be reached, pass images of your own: --build-arg PYTHON_IMAGE=… --build-arg OPA_IMAGE=…
ARG PYTHON_IMAGE=docker.io/library/python:3.13-slim-bookworm
ARG OPA_IMAGE=docker.io/openpolicyagent/opa:1.22.2-static
# Any with gcc and a static C library; Debian's is fetched where there is none.
ARG COMPILER_IMAGE=${PYTHON_IMAGE}

FROM ${COMPILER_IMAGE} AS relay
# hadolint ignore=DL3008
RUN command -v gcc >/dev/null || { apt-get update -qq \
      && apt-get install --quiet --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; }
COPY relay/relay.c /relay.c
RUN gcc -std=c11 -O2 -s -static -Wall -Wextra -Werror -o /sidegate-relay /relay.c

FROM ${PYTHON_IMAGE} AS sidecar-tree
COPY requirements/sidecar.txt /requirements.txt
# --no-deps: the lock is complete, and leaves out on purpose what is never imported.
RUN python -m pip install --quiet --no-cache-dir --no-compile --no-deps --require-hashes --only-binary :all: \
      --root-user-action=ignore --target /tree --requirement /requirements.txt
COPY certs /tree/certs
COPY sidecar /tree/sidecar
# Compiled here, because the root file system is read-only there; by content, because copies have new times.
RUN rm -rf /tree/bin && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /tree

FROM ${PYTHON_IMAGE} AS sidecar
# nft is for the init container `sidegate-net`; an image of your own may have it already.
# The version is the Debian release's, which gets nothing but fixes.
# hadolint ignore=DL3008
RUN { command -v nft >/dev/null || { apt-get update -qq \
      && apt-get install --quiet --yes --no-install-recommends nftables && rm -rf /var/lib/apt/lists/*; }; } \
    && python -m pip uninstall --quiet --yes --root-user-action=ignore pip
COPY --from=relay /sidegate-relay /usr/local/bin/sidegate-relay
COPY --from=sidecar-tree /tree /opt/sidegate
ENV PYTHONPATH=/opt/sidegate PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /
USER 15100:15100
EXPOSE 15443 15020
ENTRYPOINT ["python", "-m", "sidecar"]
ARG VERSION=dev
LABEL org.opencontainers.image.title="sidegate sidecar" \
      org.opencontainers.image.description="Enforces identity, policy, limits and audit in front of an MCP server" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"

FROM ${OPA_IMAGE} AS opa

FROM ${PYTHON_IMAGE} AS control-plane-tree
COPY requirements/webhook.txt /requirements.txt
RUN python -m pip install --quiet --no-cache-dir --no-compile --no-deps --require-hashes --only-binary :all: \
      --root-user-action=ignore --target /tree --requirement /requirements.txt
COPY certs /tree/certs
COPY sidecar /tree/sidecar
COPY webhook /tree/webhook
RUN rm -rf /tree/bin && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /tree

FROM ${PYTHON_IMAGE} AS control-plane
RUN python -m pip uninstall --quiet --yes --root-user-action=ignore pip
COPY --from=opa /opa /opa
COPY --from=control-plane-tree /tree /opt/sidegate
# HOME: the Kubernetes client asks for it when imported, and the user is in no passwd file.
ENV PYTHONPATH=/opt/sidegate PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
WORKDIR /
USER 65532:65532
EXPOSE 10250 8443 9090
ENTRYPOINT ["python", "-m", "webhook"]
ARG VERSION=dev
LABEL org.opencontainers.image.title="sidegate control plane" \
      org.opencontainers.image.description="Injects the sidecar, compiles and serves its policies" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
