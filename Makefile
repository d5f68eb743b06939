# make install | test | test-faults | test-long | lint | demo | demo-finetune | docs | clean: each creates .venv and installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/tools
SBOM := sbom.cdx.json
# Torch threads that spin while they wait starve the Ray processes of a small machine.
export OMP_WAIT_POLICY := passive

.PHONY: install test test-faults test-long lint format demo demo-finetune mlflow docs docs-serve sbom audit clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python >= 3.11 is needed, {sys.executable} is {v[0]}.{v[1]}; call make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[ablation,demo,export,server,test,dev,docs]'
	touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -m "not faults and not long"

# Kills, full disks, lost nodes and dead servers, on whole runs: minutes, not seconds.
test-faults: $(STAMP)
	$(BIN)/python -m pytest -m "faults and not long"

# The Slurm launcher, and the benchmarks of whole runs in small: before a release.
test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(STAMP)
	$(BIN)/python -m jobs.pretrain demo

demo-finetune: $(STAMP)
	$(BIN)/python -m jobs.demo_finetune

# Programs that look at the environment from outside. Inside it, one of the packages they bring
# (rfc3987-syntax) is imported by jsonschema, so by every process of Ray, for a second each.
$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet 'cyclonedx-bom>=7' pip-audit
	touch $@

# What is installed, as CycloneDX; the versions of the image are those of `install.sh`.
sbom: $(STAMP) $(TOOLS)/.installed
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o $(SBOM) $(BIN)/python

# Known vulnerabilities of what is installed; asks PyPI, so it needs the network. A package that cannot
# be looked up is a failure, too.
audit: $(STAMP) $(TOOLS)/.installed
	$(BIN)/python -m pip freeze --exclude-editable > $(TOOLS)/installed.txt
	$(TOOLS)/bin/pip-audit --strict --disable-pip --no-deps -r $(TOOLS)/installed.txt

# On 127.0.0.1, MLflow's default; without a password.
mlflow: $(STAMP)
	$(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db

# The documentation as a site, in site/; broken links and missing pages are errors.
docs: $(STAMP)
	$(BIN)/zensical build --clean --strict

docs-serve: $(STAMP)
	$(BIN)/zensical serve --dev-addr 127.0.0.1:8001

clean:
	rm -rf $(VENV) runs site .cache
