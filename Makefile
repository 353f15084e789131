# Aliases for what the README says; everything runs inside .venv, which the first of them makes.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
RUN = $(VENV)/bin/python -m

.PHONY: install fit test lint test-oldest-triton test-gpu test-faults test-slurm audit bench docs clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

fit: install
	$(RUN) mmrec.cli fit --config cpu_tiny.yaml

# One thread a worker: two pools of threads on the same cores slow each other down.
# The kernels' own run: Triton decides at import whether it interprets.
test: lint
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(JOBS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) pytest -n $(JOBS) -m interpreted tests/ops tests/decoding

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

# What a newer compiler takes an older one may refuse: the kernels once more, with the oldest Triton that pyproject.toml allows.
test-oldest-triton: install
	$(RUN) pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/oldest-triton triton==3.6.0
	OMP_NUM_THREADS=1 PYTHONPATH=build/oldest-triton $(RUN) pytest -n $(JOBS) -k "kernel and compile" tests/ops tests/decoding

test-gpu: install
	$(RUN) pytest -m gpu

# Kills, signals, hangs, long runs: what takes minutes each. One at a time: they count seconds.
test-faults: install
	OMP_NUM_THREADS=1 $(RUN) pytest -m faults

# As root, with Debian's slurm-wlm and munge: a cluster of two nodes on this machine.
test-slurm: install
	OMP_NUM_THREADS=1 $(RUN) pytest -m slurm

# Known faults of the versions in constraints.txt: by pip-audit where PyPI's or OSV's data can be reached, by known_bad_versions.csv anywhere.
audit: install
	$(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet --disable-pip-version-check pip-audit || true
	$(RUN) mmrec.scripts.audit --pip-audit build/audit/bin/pip-audit

bench: install
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(VENV)/bin/python benchmarks/operators.py

docs: install
	$(VENV)/bin/python benchmarks/document.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
