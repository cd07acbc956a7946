# Everything that a checkout can do. `make` alone lists it.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup run test faults test-docker test-k8s helm-docs sbom audit-deps check bench scale backfill down clean
.SUFFIXES:
MAKEFLAGS += --no-print-directory --no-builtin-rules
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

help: ## List what there is to do
	@awk -F ':[^#]*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s  %s\n", $$1, $$2 }' Makefile

setup: .venv/.complete .headgate/kafka-libs/.complete ## Install everything into this folder; instant where it is done

run: setup ## Run it all here: ONCE=1, TRACES=DIR, OUT=DIR, SHARDS=n, SEED=n, PROMETHEUS=auto|off|n
	@$(BIN)/python -m workers.cli run $(if $(ONCE),--once) $(if $(TRACES),--traces "$(TRACES)") \
	  $(if $(OUT),--out "$(OUT)") $(if $(SHARDS),--shards $(SHARDS)) $(if $(SEED),--seed $(SEED)) $(if $(PROMETHEUS),--prometheus $(PROMETHEUS)) $(ARGS)

scale: setup ## Change the number of exporters of what runs here, or of a Helm release: SHARDS=n, RELEASE=, NAMESPACE=
	@$(if $(SHARDS),,echo "say how many: make scale SHARDS=4" >&2; exit 2)
	@$(BIN)/python -m workers.cli scale $(SHARDS) $(if $(RELEASE),--release "$(RELEASE)") $(if $(NAMESPACE),--namespace "$(NAMESPACE)") $(ARGS)

backfill: setup ## Land what is missing: FROM=TIME, TO=TIME, ACCOUNT=, SERVICE=, VIA=, DRY_RUN=1
	@$(if $(FROM),,echo "say from when: make backfill FROM=2026-11-24T05:00:00Z" >&2; exit 2)
	@$(BIN)/python -m workers.cli backfill --from "$(FROM)" $(if $(TO),--to "$(TO)") $(if $(ACCOUNT),--account "$(ACCOUNT)") \
	  $(if $(SERVICE),--service "$(SERVICE)") $(if $(VIA),--via "$(VIA)") $(if $(DRY_RUN),--dry-run) $(ARGS)

down: ## Stop what runs here, whatever state it is in
	@if [ -e .venv/.complete ]; then $(BIN)/python -m workers.cli down; else echo "nothing runs here"; fi

test: setup .headgate/versitygw.complete .headgate/helm.complete ## Run the tests, two files at a time; ARGS goes to pytest
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

faults: setup ## Break everything, by seeds: SEEDS=n, MINUTES=m, SEED_BASE=s, ONLY=word, MUTANT=name, JSON=FILE, STANDSTILL=m, LIST=1
	@$(BIN)/python -m tests.faults.campaign $(if $(SEEDS),--seeds $(SEEDS)) $(if $(MINUTES),--minutes $(MINUTES)) \
	  $(if $(SEED_BASE),--seed-base $(SEED_BASE)) $(if $(ONLY),--only "$(ONLY)") $(if $(MUTANT),--mutant "$(MUTANT)") \
	  $(if $(JSON),--json "$(JSON)") $(if $(STANDSTILL),--standstill $(STANDSTILL)) $(if $(LIST),--list) $(ARGS)
	@$(if $(ONLY)$(MUTANT)$(STANDSTILL)$(LIST)$(ARGS),:,$(BIN)/python -m pytest -q -m brokers tests/test_fault_servers.py)
	@$(if $(ONLY)$(MUTANT)$(STANDSTILL)$(LIST)$(ARGS),:,$(BIN)/python -m tests.faults.fuzz --seconds 60 --seed $(or $(SEED_BASE),1))

test-docker: setup ## Build the image and run it, where a Docker engine answers: HEADGATE_TEST_BASE=image
	@$(BIN)/python -c 'import docker; docker.from_env(timeout=5).ping()' 2>/dev/null || \
	  { echo "test-docker: no Docker engine answers (DOCKER_HOST), so the image is not tested" >&2; exit 2; }
	@TESTCONTAINERS_RYUK_DISABLED=true $(BIN)/python -m pytest -q -m docker tests/test_docker.py $(ARGS)

test-k8s: setup .headgate/helm.complete ## Install and scale the chart on a real control plane: TOOLS=folder with kubecp, kwok
	@$(BIN)/python -m pytest -q -m k8s tests/k8s $(ARGS)

helm-docs: setup .headgate/helm.complete ## Write what is made of the chart's values: its README, schema and goldens
	@$(BIN)/python -m tests.helm_chart

sbom: setup ## Write docs/sbom.cdx.json: the image's packages, with licences, as CycloneDX
	@$(BIN)/python -m tests.sbom

audit-deps: setup ## Known vulnerabilities of what is pinned; exits 2 where advisories cannot be had
	@$(BIN)/python -m tests.audit_deps $(ARGS)

check: setup ## Lint, format and types, as CI does
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m mypy

bench: setup ## Measure: ONLY=group,group, JSON=FILE
	@$(BIN)/python -m tests.bench.run $(if $(ONLY),--only $(ONLY)) $(if $(JSON),--json "$(JSON)") $(ARGS)

clean: ## Stop what runs here; remove .headgate and .venv
	@$(MAKE) down
	@rm -rf .headgate .venv
	@echo "removed .headgate and .venv"

# A second S3 for the archive's tests. Without Go, or where it cannot be built, they skip it and say so.
.headgate/versitygw.complete:
	@mkdir -p .headgate/bin
	@if command -v go >/dev/null; then \
	  echo "setup: versitygw into .headgate/bin, a second S3 for the tests (two minutes, once)"; \
	  GOBIN="$(CURDIR)/.headgate/bin" timeout 900 go install github.com/versity/versitygw/cmd/versitygw@v1.8.0 \
	    >.headgate/go.log 2>&1 </dev/null || echo "setup: versitygw was not built, see .headgate/go.log"; \
	fi
	@touch $@

# For the chart's tests. Without Go, or where they cannot be built, those that need them are skipped and say so.
.headgate/helm.complete:
	@mkdir -p .headgate/bin
	@if [ -x .headgate/bin/helm ] && [ -x .headgate/bin/kubeconform ]; then :; \
	elif command -v go >/dev/null; then \
	  echo "setup: helm and kubeconform into .headgate/bin, for the chart's tests (five minutes, once)"; \
	  export GOBIN="$(CURDIR)/.headgate/bin" CGO_ENABLED=0 GOFLAGS=-trimpath; H=helm.sh/helm/v3; \
	  { timeout 900 go install -ldflags "-s -w -X $$H/internal/version.version=v3.22.0 -X $$H/pkg/chartutil.k8sVersionMajor=1 -X $$H/pkg/chartutil.k8sVersionMinor=37" $$H/cmd/helm@v3.22.0 && \
	    timeout 900 go install -ldflags '-s -w' github.com/yannh/kubeconform/cmd/kubeconform@v0.8.0; } \
	    >.headgate/go-helm.log 2>&1 </dev/null || echo "setup: helm was not built, see .headgate/go-helm.log"; \
	else echo "setup: no Go here, so the chart's tests are skipped unless helm and kubeconform are on the PATH"; \
	fi
	@touch $@

# Each missing one is a line, and all are named before anything is downloaded.
define PREREQUISITES
missing=0; \
need() { echo "missing: $$1: $$2" >&2; missing=1; }; \
if ! command -v $(PYTHON) >/dev/null; then \
  need "python3 3.11 or 3.12" "apt-get install python3 python3-venv | brew install python@3.12, then PYTHON=python3.12"; \
elif ! $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then \
  need "python3 3.11 or 3.12 ($(PYTHON) is another)" "install one of them and call make with PYTHON=python3.12"; \
elif ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
  need "python3's venv" "apt-get install python3-venv"; \
fi; \
if [ "$$(uname -s)-$$(uname -m)" = Linux-aarch64 ]; then \
  need "an x86-64 machine, or macOS" "the package that brings PostgreSQL (pgserver) has no wheel for Linux on ARM"; \
fi; \
java=$$(java -version 2>&1 </dev/null | sed -n 's/.* version "\([0-9]*\).*/\1/p' || true); \
if [ "$${java:-0}" -lt 17 ]; then \
  need "java, 17 or newer" "apt-get install default-jre-headless | brew install openjdk"; \
fi; \
if ! command -v mvn >/dev/null; then \
  need "mvn" "apt-get install maven | brew install maven"; \
fi; \
exit $$missing
endef

.venv/.complete: requirements/dev.txt pyproject.toml
	@$(PREREQUISITES)
	@echo "setup: Python packages into .venv (a minute or two the first time)"
	@$(PYTHON) -m venv .venv </dev/null
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-input --require-hashes -r requirements/dev.txt </dev/null
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-input --no-deps --no-build-isolation -e . </dev/null
	@touch $@

.headgate/kafka-libs/.complete: workers/kafka/pom.xml
	@$(PREREQUISITES)
	@echo "setup: Kafka's jars into .headgate/kafka-libs (43 MB)"
	@mkdir -p .headgate
	@rm -rf .headgate/kafka-libs .headgate/kafka-libs.new
	@mvn -B -l .headgate/mvn.log -f workers/kafka/pom.xml dependency:copy-dependencies \
	  "-DoutputDirectory=$(CURDIR)/.headgate/kafka-libs.new" </dev/null || { cat .headgate/mvn.log >&2; exit 1; }
	@mv .headgate/kafka-libs.new .headgate/kafka-libs
	@touch $@
