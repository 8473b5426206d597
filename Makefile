# Every target makes .venv with the pinned packages first, so each works right after a clone.
PYTHON ?= python3

.PHONY: quickstart test test-fast test-versions test-cuda-shapes test-ray lint

quickstart: .venv/installed
	.venv/bin/python train/quickstart/run.py

# One process per core: much of a test's time is spent starting other processes.
test: .venv/installed
	.venv/bin/python -m pytest --numprocesses auto

test-fast: .venv/installed
	.venv/bin/python -m pytest --numprocesses auto -m "not slow"

test-versions: .venv/installed
	.venv/bin/python tests/versions.py

test-cuda-shapes: .venv/installed
	.venv/bin/python tests/cuda_shapes.py

test-ray: .venv/installed
	.venv/bin/python -m tests.ray_build

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports

# air-benchmark goes without its dependency pytrec_eval, which does not build everywhere; pytrec-eval-terrier among the
# requirements is the same module.
.venv/installed: requirements.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	.venv/bin/pip install --quiet --no-deps air-benchmark==0.1.0
	.venv/bin/pip install --quiet --no-deps --editable .
	touch $@
