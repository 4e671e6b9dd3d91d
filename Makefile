# Two commands on a fresh machine with python3 (and venv), make and git: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

ICDCTL_TORTURE_MINUTES ?= 30

.PHONY: demo test lint torture test-slow test-methods sbom audit install format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(INSTALLED)

demo: $(INSTALLED)  ## The whole job on the embedded data set; everything under runs/demo.
	$(RUN)/icdctl demo

lint: $(INSTALLED)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

test: lint  ## Style, types, tests: what CI runs; two processes of one thread each.
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

torture: $(INSTALLED)  ## Kills, mutated files and adverse places for 30 minutes; writes the figures of docs/reliability.md.
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(RUN)/python -m torture --minutes $(ICDCTL_TORTURE_MINUTES) --page docs/reliability.md

test-methods: $(INSTALLED)  ## The methods against each other, trained on the embedded digits (4 minutes).
	$(RUN)/python -m pytest -m slow tests/test_methods_trained.py

test-slow: $(INSTALLED)  ## Everything that takes minutes: all models exported, methods trained, the demo.
	$(RUN)/python -m pytest -m slow

sbom: $(INSTALLED)  ## The packages that icdctl requires, with licences: CycloneDX 1.6 JSON, dist/icdctl.cdx.json.
	$(RUN)/python .ci/sbom.py dist/icdctl.cdx.json

audit: $(INSTALLED)  ## Known vulnerabilities of the pinned packages; says so where their list can't be reached.
	$(RUN)/python .ci/audit.py constraints.txt

format: $(INSTALLED)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
