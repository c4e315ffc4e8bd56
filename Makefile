# Every target makes the virtual environment it needs, .venv-$(LEG), from the pinned set in constraints/.
#
#   LEG=a   transformers 4.57 with optimum-onnx   (default)
#   LEG=b   transformers 5 with its own ONNX exporter
#
# On Linux the torch of the default package index can be a CUDA build of several GB; where only CPUs are around, point
# PIP_EXTRA_INDEX_URL at PyTorch's CPU index.

LEG    ?= a
PYTHON ?= python3
WORKERS ?= 2
ARGS   ?=

extras_a := optimum,dev
extras_b := onnx,dev

ifeq ($(extras_$(LEG)),)
$(error LEG=$(LEG) is not known; use LEG=a or LEG=b)
endif

VENV        := .venv-$(LEG)
BIN         := $(VENV)/bin
AUDIT       := .venv-audit
CONSTRAINTS := constraints/leg-$(LEG).txt
# -qq: only errors; the pins leave pip nothing to warn about.
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)
# Shown before the tests: a result means nothing without the versions it was found on.
PACKAGES    := torch transformers accelerate datasets evaluate optimum-onnx onnx onnxruntime onnxscript

# Two test workers with one thread each do not fight for cores, and nothing may depend on the network.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.PHONY: help demo results test soak quality versions clean
.DELETE_ON_ERROR:

help:
	@echo "make demo             distil a small pretrained encoder, export and measure it, without the Hub"
	@echo "make results          rebuild the results table: hours of training (ARGS='--glue_dir DIR --tasks mrpc rte')"
	@echo "make test             run the tests            (ARGS='tests/objective -k kl' passes options to pytest)"
	@echo "make soak             kill 50 trainings at random moments and resume them: minutes"
	@echo "make quality          lint, format check, types, known vulnerabilities of the pinned packages"
	@echo "make versions         what is installed"
	@echo "make clean            remove the environments of both legs and all caches"
	@echo
	@echo "LEG=a                 transformers 4.57 + optimum-onnx (default)"
	@echo "LEG=b                 transformers 5 + its own ONNX exporter"

demo: $(VENV)/.stamp-demo
	$(BIN)/python recipes/demo.py $(ARGS)

results: $(VENV)/.stamp
	$(BIN)/python recipes/glue_results.py $(ARGS)

test: versions
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

soak: $(VENV)/.stamp
	$(BIN)/python recipes/soak.py --kills 50 --results_file recipes/results/soak.json $(ARGS)

quality: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# Newest, and apart from the pins: it is no part of what is tested.
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/python -m pip install -qq \
	    --disable-pip-version-check --retries 1 --timeout 10 pip-audit; } || true
	$(BIN)/python .ci/audit.py $(AUDIT)/bin/pip-audit constraints/leg-*.txt

versions: $(VENV)/.stamp
	@$(BIN)/python -c 'import sys, importlib.metadata as m; \
	has = {d.name.lower(): d.version for d in m.distributions()}; \
	print("leg $(LEG): python", sys.version.split()[0], *(f"| {p} {has[p]}" for p in sys.argv[1:] if p in has))' $(PACKAGES)

# The stamp is written last: an installation that broke off is repeated by the next make.
$(VENV)/.stamp: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("hf_kd needs Python >= 3.10, but $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	@echo "[1/2] creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/2] installing hf_kd[$(extras_$(LEG))] with the versions of $(CONSTRAINTS) (a minute or two)"
	@$(PIP_INSTALL) -e ".[$(extras_$(LEG))]"
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp
	@echo "installing the demo's encoder (90 MB)"
	@$(PIP_INSTALL) -e ".[$(extras_$(LEG)),demo]"
	@touch $@

clean:
	rm -rf .venv-a .venv-b $(AUDIT) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find hf_kd recipes tests -type d -name __pycache__ -prune -exec rm -rf {} +
