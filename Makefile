# What a developer, CI and a release run. A machine needs make, Python >= 3.11 with venv, and root for `make e2e`;
# everything else comes from package registries, pinned.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' sidecar/__init__.py)
UV = uv==0.13.9

# One environment per content of these two files: a new lock makes a new stamp.
READY = $(VENV)/.locked-$(shell cat requirements/dev.txt pyproject.toml | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.SILENT:
MAKEFLAGS += --no-print-directory
.PHONY: help demo lint test e2e policy-conformance conformance matrix fuzz bench docs examples test-all-pythons lock images clean

help:
	echo "make demo              a public server, governed on this machine; ONCE=1: run it once and check it"
	echo "make lint              style, types, layers, spelling, Dockerfile"
	echo "make test              everything that needs no root"
	echo "make e2e               a real cluster with real SPIRE (root)"
	echo "make policy-conformance  OPA's published cases through our Rego engine (10 minutes)"
	echo "make conformance       the official MCP suite and public servers, direct and through the sidecar"
	echo "make test-all-pythons  make test under 3.11, 3.12 and 3.13"
	echo "make matrix            SDKs of every generation, and ambiguous requests, at real servers through the sidecar"
	echo "make fuzz SECONDS=300  every reader of foreign bytes, with inputs that nobody wrote"
	echo "make bench             what a call costs here, nginx and Envoy beside it"
	echo "make docs              write the generated reference pages again"
	echo "make examples          build the examples' signed bundles again"
	echo "make lock              resolve requirements/*.txt again"
	echo "make images            both container images (docker, podman or buildah)"
	echo "make clean             remove what the others made"

$(READY): requirements/dev.txt pyproject.toml
	command -v $(PYTHON) >/dev/null || { echo "make: error: no $(PYTHON) on PATH; hint: make PYTHON=/path/to/python3.13" >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); hint: make PYTHON=python3.13" >&2; exit 1; }
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: error: $(PYTHON) lacks venv or pip; hint: Debian and Ubuntu have them in python3-venv" >&2; exit 1; }
	echo "venv: $(VENV), $$($(PYTHON) -V), requirements/dev.txt"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/.locked-*
	touch $@

demo: $(READY)
	$(BIN)/sidegate demo $(if $(ONCE),--once)

lint: $(READY)
	echo "lint: ruff"
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	echo "lint: mypy"
	$(BIN)/mypy --no-error-summary
	echo "lint: import contracts"
	said=$$($(BIN)/lint-imports --no-cache 2>&1) || { echo "$$said"; exit 1; }
	echo "lint: generated pages"
	$(BIN)/python docs/generate.py --check
	echo "lint: spelling"
	$(BIN)/codespell
	echo "lint: Dockerfile"
	! test -x $(BIN)/hadolint || $(BIN)/hadolint Dockerfile  # no wheel but for x86_64 Linux

# The parts are named here so that their builds, minutes at first, are seen; the tests would make them silently.
test: $(READY)
	echo "test: parts"
	$(BIN)/python -m tests.parts opa helm redis-server >/dev/null
	echo "test: pytest"
	$(BIN)/python -m pytest --quiet -m "not e2e and not real_spire and not real_provider and not real_apiserver" --ignore tests/e2e --cov --cov-report term:skip-covered
	echo "test: every branch of the injection core"
	$(BIN)/python -m coverage report --include="$(INJECTION)" --fail-under 100 --show-missing --skip-covered

# What decides about pods and changes them: nothing of it may go untried.
INJECTION = webhook/core/annotations.py,webhook/core/bounds.py,webhook/core/container.py,webhook/core/injection.py,webhook/core/node_paths.py,webhook/core/obstacles.py,$\
  webhook/core/patch.py,webhook/core/placement.py,webhook/core/pod.py,webhook/core/probes.py,webhook/core/quantity.py,webhook/core/relay.py

e2e: $(READY)
	test "$$(id -u)" = 0 || { echo "make: error: e2e starts a cluster in namespaces of its own, and needs root; hint: sudo make e2e" >&2; exit 1; }
	echo "e2e: parts (20 minutes at first, on two cores)"
	$(BIN)/python -m tests.parts opa helm kubectl kubernetes etcd containerd cni-plugins spire spire-controller-manager \
	  spiffe-csi-driver otelcol prometheus node-tools buildah busybox-root python-root node-root gcc-root java keycloak \
	  kubernetes-mcp-server oidc-provider mcp-typescript-1.32 mcp-typescript-2.4 >/dev/null
	echo "e2e: pytest, always in the same order, as the modules share one cluster"
	$(BIN)/python -m pytest --quiet -p no:randomly -m "e2e or real_spire or real_provider or real_apiserver" tests

policy-conformance: $(READY)
	echo "policy-conformance: parts"
	$(BIN)/python -m tests.parts opa opa-cases >/dev/null
	$(BIN)/python -m tests.rego_conformance

conformance: $(READY)
	echo "conformance: parts"
	$(BIN)/python -m tests.parts node mcp-conformance mcp-typescript mcp-server-everything kubernetes-mcp-server \
	  mcp-servers-npm mcp-servers-python mcp-servers-python-1 mcp-server-excel mcp-servers-go >/dev/null
	$(BIN)/python -m tests.conformance

matrix: $(READY)
	echo "matrix: parts"
	$(BIN)/python -m tests.parts node mcp-python-1.8 mcp-python-1.30 mcp-typescript-1.32 mcp-typescript-2.4 mcp-go mcp-go-1.6 >/dev/null
	echo "matrix: clients and requests (4 minutes, on two cores)"
	$(BIN)/python -m tests.matrix

SECONDS ?= 300
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz $(SECONDS)

bench: $(READY)
	$(BIN)/python -m bench
	$(BIN)/python -m bench.decisions
	$(BIN)/python -m bench.limits
	$(BIN)/python -m bench.observing
	$(BIN)/python -m bench.audit
	$(BIN)/python -m bench.admission
	$(BIN)/python -m bench.polling --sidecars 2000 --workloads 20 --changes 3

docs: $(READY)
	$(BIN)/python docs/generate.py

examples: $(READY)
	$(BIN)/python examples/article/build.py $$($(BIN)/python -m tests.parts opa)

test-all-pythons:
	set -e; missing=; for version in 3.11 3.12 3.13; do \
	  found=; for candidate in python$$version $(HOME)/.pyenv/versions/$$version.*/bin/python; do \
	    if "$$candidate" -c 'import venv' 2>/dev/null; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then missing="$$missing $$version"; continue; fi; \
	  echo "== Python $$version"; \
	  $(MAKE) test PYTHON="$$found" VENV=".venv-$$version"; \
	done; \
	[ -z "$$missing" ] || echo "not run, no such interpreter here:$$missing"

# Hashes for every platform and every supported Python, and no index host: each machine uses its own.
COMPILE = build/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate
lock:
	mkdir -p build
	touch requirements/dev.txt
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet --disable-pip-version-check $(UV)
	echo "lock: dev, sidecar, webhook"
	$(COMPILE) --upgrade --extra sidecar --extra webhook --extra dev --extra demo pyproject.toml >build/dev.txt
	mv build/dev.txt requirements/dev.txt
	for plane in sidecar webhook; do \
	  $(COMPILE) --constraint requirements/dev.txt --extra $$plane --output-file build/$$plane.txt $(UNUSED) pyproject.toml >/dev/null \
	  && mv build/$$plane.txt requirements/$$plane.txt || exit 1; \
	done

# Of the distribution `spiffe` one generated file is loaded (certs/messages.py); what its client needs stays out of the images.
UNUSED = --no-emit-package grpcio --no-emit-package pem --no-emit-package pyasn1 --no-emit-package pyasn1-modules

ENGINE ?= $(firstword $(shell command -v docker podman buildah))
images:
	test -n "$(ENGINE)" || { echo "make: error: no docker, podman or buildah on PATH; hint: apt install buildah" >&2; exit 1; }
	$(ENGINE) build --build-arg VERSION=$(VERSION) --target control-plane --tag sidegate:$(VERSION) .
	$(ENGINE) build --build-arg VERSION=$(VERSION) --target sidecar --tag sidegate-sidecar:$(VERSION) .

clean:
	rm -rf build dist *.egg-info .venv* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*
