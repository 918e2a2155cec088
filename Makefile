# make demo    a conversation with the cache and without, side by side
# make serve   talk to the embedded model on http://127.0.0.1:8000 (PORT=8123 MODEL=dir HOST=0.0.0.0 ARGS="--budget 4GiB")
# make test    what CI runs on code: pytest, without the slow sweeps (WORKERS=2 processes, ARGS="-k scheduler")
# make test-all   the slow sweeps as well
# make conformance   clients that need versions of their own: LiteLLM, instructor, lm-eval (1 GB in .venv/conformance)
# make router   vllm-router in .venv/router (130 MB), in front of two servers
# make ray     Ray Serve in .venv/ray (380 MB beside .venv), with two replicas
# make check   lint, types, tests
# make install   only sets up .venv for all of these; make serve needs less and installs less

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
ARGS ?=
# Where torch comes from. PyPI's build for Linux brings gigabytes of CUDA: where there is no NVIDIA driver, and pip has
# not been told where to look, it is PyTorch's own index of builds for CPUs.
TORCH_INDEX ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu
DRIVER := /proc/driver/nvidia
WORKERS ?= 2
BIN := .venv/bin
# What is in .venv: all that a server needs, or also what benchmarks and tests do.
SERVER := .venv/.server
STAMP := .venv/.installed
# A build of torch for CPUs needs no Triton; our kernels are tested with this one. Builds for CUDA bring their own.
TRITON := 3.9.0
# The oldest Triton that kernels have to compile under, beside the one that is used; tests look for it here.
OLD_TRITON := 3.6.0
# Clients whose versions do not go together with ours; they talk to a server of .venv.
CLIENTS := litellm instructor lm_eval
CLIENTS_VENV := .venv/conformance
# A router, which needs others yet; it stands in front of servers of .venv.
ROUTER_VENV := .venv/router
# Ray Serve, which has all else from .venv.
RAY_VENV := .venv/ray

PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
torch_index = $(if $(TORCH_INDEX),echo --extra-index-url $(TORCH_INDEX),\
	test "$$(uname -s)" != Linux || test -e $(DRIVER) || $(BIN)/python -m pip config list | grep -E 'index-url|find-links' >/dev/null \
	|| echo --extra-index-url $(CPU_INDEX))
triton = test "$$(uname -sm)" != "Linux x86_64" || $(BIN)/python -m pip show torch | grep '^Requires:.*triton' >/dev/null \
	|| echo triton==$(TRITON)
PYTEST = OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: install demo serve test test-all conformance router ray lint check clean

install: $(STAMP)

$(SERVER): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %s" % sys.version)'
	@echo "Setting up .venv, once: 1.3 GB, which takes minutes and says nothing meanwhile."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt $$($(torch_index)) torch
	$(PIP) -c constraints.txt -e .
	touch $@

$(STAMP): $(SERVER)
	$(PIP) -c constraints.txt -e '.[bench,dev]' $$($(triton))
	test "$$(uname -sm)" != "Linux x86_64" || test -d .venv/triton-$(OLD_TRITON) || \
		$(PIP) --no-deps --target .venv/triton-$(OLD_TRITON) triton==$(OLD_TRITON)
	touch $@

demo: $(SERVER)
	$(BIN)/hybrid-cache demo $(MODEL) $(ARGS)

serve: $(SERVER)
	$(BIN)/hybrid-cache serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: install
	$(PYTEST) -m "not slow" $(ARGS)

test-all: install $(ROUTER_VENV)/.installed $(RAY_VENV)/.installed
	$(PYTEST) $(ARGS)

$(CLIENTS_VENV)/.installed: tests/conformance/requirements.txt
	test -x $(CLIENTS_VENV)/bin/python || $(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/conformance/requirements.txt
	touch $@

conformance: install $(CLIENTS_VENV)/.installed
	HYBRID_CACHE_PYTHON=$(CURDIR)/$(BIN)/python $(CLIENTS_VENV)/bin/python -m pytest -W ignore \
		--confcutdir=tests/conformance $(CLIENTS:%=tests/conformance/test_%.py) $(ARGS)

$(ROUTER_VENV)/.installed: tests/conformance/requirements-router.txt
	test -x $(ROUTER_VENV)/bin/python || $(PYTHON) -m venv $(ROUTER_VENV)
	$(ROUTER_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/conformance/requirements-router.txt
	touch $@

router: install $(ROUTER_VENV)/.installed
	$(BIN)/python -m pytest tests/conformance/test_vllm_router.py $(ARGS)

$(RAY_VENV)/.installed: tests/api/ray/requirements.txt $(STAMP)
	test -x $(RAY_VENV)/bin/python || $(PYTHON) -m venv $(RAY_VENV)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(RAY_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	$(RAY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/api/ray/requirements.txt
	touch $@

ray: install $(RAY_VENV)/.installed
	$(BIN)/python -m pytest tests/api/ray/test_serve.py $(ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
