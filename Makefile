# nanochat kit. `make help` lists the targets; each makes the set-up that it needs.
VERSION := 0.1.0
IMAGE   := nanochat:$(VERSION)
PYTHON  ?= python3
VENV    := .venv
CLOUD   := .venv-cloud
PY      := $(VENV)/bin/python
RUST    := $(shell find rustbpe \( -name '*.rs' -o -name '*.pyi' \) -not -path '*/target/*' 2>/dev/null) rustbpe/Cargo.toml rustbpe/Cargo.lock rustbpe/pyproject.toml
RUN     ?= runs/smoke
DATA    ?= smoke
SKYPILOT_RUNTIME ?= 1
SIF ?= build/nanochat.sif
SOURCE ?= $(IMAGE)
REQUIREMENTS ?= requirements.lock

.DEFAULT_GOAL := help
.PHONY: help setup smoke test lint fmt build bench e2e e2e-long lock clean image image-test push registry-named sbom sif cluster cluster-down

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | awk -F': *' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## virtual environment in .venv, locked packages, the Rust tokenizer

$(VENV)/.packages: requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "The venv module is missing: apt-get install python3-venv (Debian, Ubuntu), dnf install python3 (Fedora)"; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

$(VENV)/.ready: $(VENV)/.packages pyproject.toml $(RUST)
	@command -v cargo >/dev/null || \
	  { echo "A Rust toolchain (1.85 or newer) is needed to build the tokenizer: apt-get install cargo (Debian 13), cargo-web (Debian 12), brew install rust (macOS), or rustup. Without one, docs/local.md says how to use a wheel."; exit 1; }
	$(PY) -m maturin build --release --quiet --manifest-path rustbpe/Cargo.toml --interpreter $(PY) --out build/wheels
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall build/wheels/rustbpe-*.whl
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

cloud-venv: $(CLOUD)/.ready  ## SkyPilot in .venv-cloud, an environment of its own

$(CLOUD)/.ready: requirements-cloud.lock pyproject.toml $(VENV)/.packages
	@$(PYTHON) -m venv $(CLOUD)
	$(VENV)/bin/uv pip install --quiet --python $(CLOUD)/bin/python --require-hashes -r requirements-cloud.lock
	$(VENV)/bin/uv pip install --quiet --python $(CLOUD)/bin/python --no-deps --no-build-isolation --editable .
	@touch $@

smoke: setup  ## every stage at toy size on this CPU, then the report (about 4 minutes)
	NANOCHAT_OFFLINE=1 $(PY) entrypoint.py run @configs/smoke.toml --run-dir $(RUN)
	@echo
	@echo "Report:  $(RUN)/report.md and $(RUN)/report.html"
	@echo "Talk:    $(VENV)/bin/nanochat chat $(RUN)"

test: setup $(if $(CI),cloud-venv)  ## unit tests and the toy run; no engine needed (under 3 minutes)
	$(PY) -m pytest tests/unit -m "not long"

lint: setup  ## ruff, mypy, import contracts, cargo fmt, clippy and tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	cd rustbpe && cargo fmt --check && cargo clippy --all-targets --quiet -- -D warnings && cargo test --quiet

fmt: setup  ## format Python and Rust
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	cd rustbpe && cargo fmt

build: setup  ## wheels of the kit and of the tokenizer in build/wheels
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheels .

image:  ## the Docker image (DATA=smoke|cpu|d20|none, SKYPILOT_RUNTIME=1|0)
	infra/image/build.sh $(IMAGE) --build-arg DATA=$(DATA) --build-arg REQUIREMENTS=$(REQUIREMENTS) \
	  --build-arg SKYPILOT_RUNTIME=$(SKYPILOT_RUNTIME)

image-test:  ## the unit tests inside the image
	infra/image/build.sh $(IMAGE)-test --target test --build-arg DATA=none \
	  --build-arg REQUIREMENTS=$(REQUIREMENTS)
	docker run --rm --network none $(IMAGE)-test

push: registry-named image  ## push the image to REGISTRY=host/name, and print the digest to name it by
	docker tag $(IMAGE) $(REGISTRY)/$(IMAGE)
	docker push $(REGISTRY)/$(IMAGE)
	@docker image inspect --format '{{join .RepoDigests "\n"}}' $(IMAGE) | grep '^$(REGISTRY)/'

registry-named:
	@test -n "$(REGISTRY)" || { echo "Where to? make push REGISTRY=ghcr.io/yourname"; exit 1; }

sif:  ## the image as a SIF for Apptainer (SIF=, SOURCE=image, archive.tar or registry URL)
	infra/slurm/build_sif.sh $(SOURCE) $(SIF)

cluster: setup  ## a SLURM cluster in containers, with the SIF of IMAGE, to try docs/ptolemy.md on
	$(PY) -m tests.twin.slurm.cluster up $(IMAGE)

cluster-down:  ## remove that cluster and what is on its scratch, not the SIF
	$(PY) -m tests.twin.slurm.cluster down

sbom: image  ## the image's bill of materials, build/sbom.cdx.json (CycloneDX)
	@mkdir -p build
	docker run --rm $(IMAGE) cat /opt/nanochat/sbom.cdx.json > build/sbom.cdx.json

bench: setup  ## every benchmark; prints JSON with the ratio to a named peer
	for script in bench/*.py; do $(PY) $$script; done

e2e: setup cloud-venv  ## real Docker, SLURM, cloud twin and browser, in short form
	$(PY) -m pytest tests/e2e -m "not long"

e2e-long: setup cloud-venv  ## the full counts of the proofs
	$(PY) -m pytest tests/e2e
	$(PY) -m pytest tests/unit -m long

lock:  ## resolve the dependencies again into the lock files
	$(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml
	$(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" --extra dev --constraint requirements.lock --output-file requirements-dev.lock pyproject.toml
	$(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" --constraint infra/image/cuda12.in --output-file requirements-cuda12.lock pyproject.toml
	$(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" --constraint requirements.lock --extra wandb --output-file requirements-wandb.lock pyproject.toml
	$(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" --output-file requirements-cloud.lock requirements-cloud.in
	$(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" --output-file infra/image/tools.lock infra/image/tools.in
	$(VENV)/bin/uv pip compile --quiet --python-platform x86_64-manylinux_2_28 --no-emit-package skypilot --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" --output-file infra/image/skypilot-runtime.lock infra/image/skypilot-runtime.in
	$(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" --constraint requirements-dev.lock --output-file tests/oracle/requirements.lock tests/oracle/requirements.in

clean:  ## remove what the targets made, except runs
	rm -rf $(VENV) $(CLOUD) build rustbpe/target .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
