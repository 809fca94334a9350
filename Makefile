# Everything a developer or CI runs. `make help` lists the targets.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --progress-bar off -q

.PHONY: help setup demo demo-model parity test unit integration k8s images e2e rehearsal check fmt protos bench chaos fuzz clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed; say which with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV) || { \
	  echo "error: no venv; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }; }
	@echo "installing expertmesh and what it needs (a few minutes the first time)"
	@# torch first and alone: a range would bring the newest build with gigabytes of CUDA
	@$(PIP) "$$(grep '^torch==' constraints.txt)" && $(PIP) -c constraints.txt -e '.[dev]' || { \
	  echo "error: the installation failed, see above. It needs a package index and 3 GB of disk;"; \
	  echo "       make again goes on where it stopped, make clean starts over"; exit 1; }
	@touch $@

setup: $(STAMP)  ## create .venv with everything

demo: $(STAMP)  ## serve the demo model here and compare it with transformers (KEEP=1 leaves it up)
	$(BIN)/expertmesh demo $(if $(KEEP),--keep)

demo-model: $(STAMP)  ## train the demo model again (about ten minutes)
	$(BIN)/python examples/train/train_demo.py --out examples/demo-moe

parity: $(STAMP)  ## compare a served checkpoint with transformers: make parity MODEL=dir
	@test -n "$(MODEL)" || { echo "error: say which checkpoint directory: make parity MODEL=dir"; exit 1; }
	$(BIN)/expertmesh parity $(MODEL)

# two processes: e2e tests use both cores by themselves
SIDE_BY_SIDE := -n 2 --dist loadfile

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/unit tests/integration tests/k8s
	$(BIN)/python -m pytest tests/e2e

unit: $(STAMP)  ## tests without sockets
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/unit

integration: $(STAMP)  ## tests with real Redis and gRPC
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/integration

k8s: $(STAMP)  ## tests of manifests and images
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/k8s

images: $(STAMP)  ## build and run the images (needs root, podman, debootstrap; 10 minutes the first time)
	IMAGES=1 $(BIN)/python -m pytest tests/k8s/test_built_images.py

e2e: $(STAMP)  ## tests of the whole mesh in processes, with real Ray
	$(BIN)/python -m pytest tests/e2e

rehearsal: $(STAMP)  ## kubectl apply, and what breaks a cluster, in network namespaces (needs root)
	REHEARSAL=1 $(BIN)/python -m pytest tests/e2e/test_rehearsal.py

bench: $(STAMP)  ## benchmarks side by side with peers, into benchmarks/results (ONLY="overhead dense": some)
	$(BIN)/python -m benchmarks $(ONLY)

chaos: $(STAMP)  ## break a mesh under load in every way, into benchmarks/results (ONLY="kill stop": some)
	$(BIN)/python -m chaos $(ONLY)

fuzz: $(STAMP)  ## mutate inputs of everything that reads a peer's bytes, guided by coverage (INPUTS=n)
	nice $(BIN)/python -m tests.fuzz $(if $(INPUTS),--inputs $(INPUTS))

check: $(STAMP)  ## formatting, lint, types, layers, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python protos/generate.py --check
	$(BIN)/lint-imports
	$(BIN)/mypy

fmt: $(STAMP)  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(STAMP)  ## regenerate the committed protobuf code
	$(BIN)/python protos/generate.py

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
