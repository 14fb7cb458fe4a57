# Each target works alone on a fresh clone: it needs a python3 (3.11 or newer) and makes .venv when it is not there.
# PYTHON=... picks another interpreter.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.PHONY: demo test test-deepspeed test-faults test-lightning test-nodes test-nodes-faults test-package test-ray test-remote test-xla lint format bench clean

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Always with the constraints: a bare `torch` would pull in the newest build, gigabytes of GPU libraries included.
INSTALL := -m pip --disable-pip-version-check install --quiet -c constraints.txt

# The tests that have no target of their own.
COMMON := not deepspeed and not faults and not lightning and not nodes and not package and not ray and not remote and not xla

# Another project's source roots or virtual environment must not leak in; the installed package is what is tested.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

demo: $(VENV)/.demo
	$(BIN)/python examples/quickstart.py

# One thread a process: the tests start many. Three workers for two cores, because tests of processes wait for these.
# A test marked `alone` measures time and so has the machine to itself.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not alone and $(COMMON)"
	$(BIN)/python -m pytest -m alone

# The long ones: processes are killed at hundreds of random moments. TREADLE_FAULTS_SEED=n draws others.
test-faults: export OMP_NUM_THREADS = 1
test-faults: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "faults and not nodes"

# Programs written for Lightning, with Lightning itself, by `treadle run`, and after `treadle migrate`.
test-lightning: export OMP_NUM_THREADS = 1
test-lightning: .venv-bench/.done
	.venv-bench/bin/python -m pytest -n 2 --dist loadgroup -m lightning tests/migration

# Two hosts of namespaces, joined by a cable of the kernel's. Needs root on Linux; skipped with a word otherwise.
test-nodes: export OMP_NUM_THREADS = 1
test-nodes: $(VENV)/.dev
	$(BIN)/python -m pytest -m "nodes and not faults" tests/nodes

# The long ones: hosts are lost in all ways, for each way to start a run, and torchrun replaces them.
test-nodes-faults: export OMP_NUM_THREADS = 1
test-nodes-faults: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "nodes and faults" tests/nodes

# DeepSpeed on the CPU, which compiles an operator of its own at its first use.
test-deepspeed: export OMP_NUM_THREADS = 1
test-deepspeed: export DS_ACCELERATOR = cpu
test-deepspeed: .venv-deepspeed/.done
	PATH="$(CURDIR)/.venv-deepspeed/bin:$$PATH" .venv-deepspeed/bin/python -m pytest -m deepspeed tests/deepspeed

# XLA's devices on the CPU, with torch 2.9, the oldest that Treadle allows: 7 GB. The other tests run there, too.
test-xla: export OMP_NUM_THREADS = 1
test-xla: .venv-xla/.done
	PJRT_DEVICE=CPU .venv-xla/bin/python -m pytest -m xla tests/xla
	.venv-xla/bin/python -m pytest -n 2 --dist worksteal -m "not alone and $(COMMON)"

# The wheel and the sdist; the wheel in an environment of its own: a second download of torch, or pip's copy.
test-package: export OMP_NUM_THREADS = 1
test-package: $(VENV)/.dev
	$(BIN)/python -m pytest -m package tests/package

# Workers of Ray Train and searches with Ray Tune, which bring pandas and pyarrow along.
RAY_TESTS ?= tests/ray
test-ray: export OMP_NUM_THREADS = 1
test-ray: .venv-ray/.done
	.venv-ray/bin/python -m pytest -m ray $(RAY_TESTS)

# Checkpoints on an S3 server (moto's), which is reached by HTTP.
test-remote: export OMP_NUM_THREADS = 1
test-remote: .venv-remote/.done
	.venv-remote/bin/python -m pytest -m remote tests/remote

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# lightning 2.6.2 and 2.6.3 on the package index were malicious uploads: name the version, never a range.
bench: .venv-bench/.done
	.venv-bench/bin/python benchmarks/bench.py
	.venv-bench/bin/python benchmarks/engines.py

clean:
	rm -rf .venv .venv-bench .venv-deepspeed .venv-ray .venv-remote .venv-xla build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "Treadle needs Python 3.11 or newer; none was found. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.made
	$(BIN)/python $(INSTALL) -e '.[demo]'
	touch $@

# dev contains demo
$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.made
	$(BIN)/python $(INSTALL) -e '.[dev]'
	touch $(VENV)/.demo $@

.venv-bench/.done: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Treadle needs Python 3.11 or newer; none was found. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python $(INSTALL) -e '.[cli,demo]' lightning==2.6.6 accelerate==1.15.0 \
		pytest pytest-timeout pytest-xdist torchmetrics
	touch $@

# DeepSpeed's build looks for the torch that is installed.
.venv-deepspeed/.done: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Treadle needs Python 3.11 or newer; none was found. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv-deepspeed
	.venv-deepspeed/bin/python $(INSTALL) torch numpy setuptools wheel ninja
	.venv-deepspeed/bin/python $(INSTALL) --no-build-isolation deepspeed
	.venv-deepspeed/bin/python $(INSTALL) -e '.[trainer,deepspeed]' pytest pytest-timeout torchmetrics
	touch $@

# torch-xla and torchao go with an older torch than everything else.
.venv-xla/.done: pyproject.toml constraints.txt tests/xla/constraints.txt
	@test -n "$(PYTHON)" || { echo "Treadle needs Python 3.11 or newer; none was found. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv-xla
	grep -v -e '^torch==' -e '^torchao==' constraints.txt > .venv-xla/constraints.txt
	cat tests/xla/constraints.txt >> .venv-xla/constraints.txt
	.venv-xla/bin/python -m pip --disable-pip-version-check install --quiet -c .venv-xla/constraints.txt -e '.[dev,xla]'
	touch $@

.venv-ray/.done: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Treadle needs Python 3.11 or newer; none was found. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python $(INSTALL) -e '.[trainer,ray,tune]' pytest pytest-timeout
	touch $@

# botocore needs an older python-dateutil than everything else.
.venv-remote/.done: pyproject.toml constraints.txt tests/remote/constraints.txt
	@test -n "$(PYTHON)" || { echo "Treadle needs Python 3.11 or newer; none was found. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv-remote
	grep -v '^python-dateutil==' constraints.txt > .venv-remote/constraints.txt
	cat tests/remote/constraints.txt >> .venv-remote/constraints.txt
	.venv-remote/bin/python -m pip --disable-pip-version-check install --quiet -c .venv-remote/constraints.txt \
		-e '.[trainer,s3]' 'moto[s3]' flask flask-cors psutil pytest pytest-timeout
	touch $@
