# Everything is set up in .venv on first use; nothing is written outside .venv and $(OUT).
# Not ?=: these names are too common to be taken from the environment.
OUT = demo_out
TEXT =
SRC =
DEMO_ARGS =

VENV := .venv
RUN := $(VENV)/bin/python
CACHE := $(CURDIR)/$(VENV)/cache

# pip compiles what it installs, so no run needs to write bytecode, least of all into the sources.
export PYTHONDONTWRITEBYTECODE := 1
export XDG_CACHE_HOME := $(CACHE)
export MPLCONFIGDIR := $(CACHE)/matplotlib
export TORCHINDUCTOR_CACHE_DIR := $(CACHE)/inductor
export TRITON_CACHE_DIR := $(CACHE)/triton
export CUDA_CACHE_PATH := $(CACHE)/cuda
export MYPY_CACHE_DIR := $(CACHE)/mypy
export RUFF_CACHE_DIR := $(CACHE)/ruff
# The second constrains build environments, which pip 25.3 stopped applying the first to.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A stamp is named after what it stands for: a changed requirement, or a moved checkout, has none.
KEY := $(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | cut -d ' ' -f 1)
DEMO_STAMP := $(VENV)/demo-$(KEY)
DEV_STAMP := $(VENV)/dev-$(KEY)
# The older Megatron that is supported, for the tests.
MEGATRON_018 := $(VENV)/megatron-0.18.2
# Transformer Engine has an environment of its own: where it is installed Megatron uses it. Its wheel
# is kept while its version and torch's stay. It is built within this checkout, whose commit it would
# take for its own and append to its version (NVTE_NO_LOCAL_VERSION).
TE := $(VENV)/te
TE_STAMP := $(VENV)/te-$(KEY)
TE_WHEELS := $(VENV)/te-wheels-$(shell grep -E '^(torch|transformer_engine.*)==' constraints.txt \
	| cksum | cut -d ' ' -f 1)
# Wheels of gigabytes pass through here once: no cache, and no use of a small /tmp.
PIP = TMPDIR="$(CURDIR)/$(VENV)/tmp" $(1) -m pip install --quiet --no-cache-dir

.DEFAULT_GOAL := help
.PHONY: help demo test test-slurm test-te test-megatron test-latest lint types docs constraints clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

demo: $(DEMO_STAMP) ## train a small GPT with Pion, Muon and AdamW in Megatron, draw OUT/demo.png (OUT=folder TEXT="files or folders" DEMO_ARGS="--iterations 100")
	@$(RUN) examples/demo.py --out "$(OUT)" $(if $(TEXT),--text $(TEXT)) $(DEMO_ARGS)

# Side by side, since most launches keep one core busy. A file's tests share launches and stay together.
# (xdist 3.8 cannot keep smaller groups together with pytest 9.2.) Four workers with 8 ranks of Megatron
# each need 16 GiB.
test: $(DEV_STAMP) ## run the tests, the fast ones first (PYTEST_ADDOPTS="-k name" narrows it)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -o cache_dir="$(CACHE)/pytest" --basetemp=$(VENV)/tmp/pytest \
		--numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slurm: $(DEV_STAMP) ## submit examples/slurm to a SLURM of two nodes, here (root installs it with apt-get)
	@tools/install_slurm.sh
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" tools/with_slurm.sh $(VENV)/slurm python -m pytest \
		-o cache_dir="$(CACHE)/pytest" --basetemp=$(VENV)/tmp/pytest tests/tools/test_slurm.py

test-te: $(TE_STAMP) ## build Transformer Engine into .venv/te, once (20 minutes, 6 GB), and run the tests of FP8
	@$(TE)/bin/python -m pytest -o cache_dir="$(CACHE)/pytest" --basetemp=$(VENV)/tmp/pytest-te \
		tests/megatron/test_transformer_engine.py tests/megatron/test_fp8.py

# Checks in one process, resumes, a training at TP 2 and DP 2 whose checkpoint moves, and Megatron's
# own tests of optimizers, with Pion in Adam's place.
UNIT_TESTS := test_optimizer.py training/test_param_norm.py optimizer transformer/test_mup.py \
	test_optimizer_param_scheduler.py test_emerging_optimizers.py models/mimo/test_mimo_optimizer_consensus.py
test-megatron: $(DEV_STAMP) ## run some of the tests against another Megatron (SRC=a checkout of Megatron-LM)
	@test -d "$(SRC)/megatron/core" || { echo "make test-megatron SRC=CHECKOUT: there is no" \
		"$(SRC)/megatron/core; git clone https://github.com/NVIDIA/Megatron-LM CHECKOUT"; exit 2; }
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" MAKEFLAGS= make --no-print-directory -C "$(SRC)/megatron/core/datasets" \
		LIBEXT="$$($(RUN) -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"
	@OMP_NUM_THREADS=1 PYTHONPATH="$(abspath $(SRC))" $(RUN) -m pytest -o cache_dir="$(CACHE)/pytest" \
		--basetemp=$(VENV)/tmp/pytest-megatron tests/megatron/test_megatron.py tests/megatron/test_layouts.py \
		-k "checks_inside or prints_the_same_losses or (float32 and tp2-dp2-dist-opt) or tp2-dp2-dist-opt-to"
	@cd "$(SRC)" && OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)/tests/support:$(CURDIR):$(abspath $(SRC))" \
		$(abspath $(VENV))/bin/torchrun --standalone --nproc-per-node 1 -m pytest -p megatron_unit_tests \
		-p no:cacheprovider -q $(addprefix tests/unit_tests/,$(UNIT_TESTS))

# What the next `make constraints` may bring; pyproject.toml's bounds hold.
LATEST := $(VENV)/latest
test-latest: | $(RUN) ## run the fast tests with the newest releases of everything, installed anew (several GB)
	@mkdir -p $(VENV)/tmp && rm -rf $(LATEST) && $(RUN) -m venv $(LATEST)
	@PIP_CONSTRAINT= PIP_BUILD_CONSTRAINT= $(call PIP,$(LATEST)/bin/python) -e '.[dev]'
	@$(LATEST)/bin/python -m pip list | grep -iE '^(torch|triton|numpy|transformers|megatron-core) '
	@OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest -o cache_dir="$(CACHE)/pytest" \
		--basetemp=$(VENV)/tmp/pytest-latest --numprocesses auto --dist loadfile -m "not slow"

lint: $(DEV_STAMP) ## check the style: ruff's rules and format
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

types: $(DEV_STAMP) ## check the types: mypy, strict
	@$(RUN) -m mypy

docs: $(DEV_STAMP) ## build the documentation in .venv/docs and check its links
	@$(RUN) -m sphinx -c docs -W --keep-going -q -d $(VENV)/docs/doctrees . $(VENV)/docs/html
	@echo "$(VENV)/docs/html/docs/index.html"

clean: ## remove .venv and demo_out
	rm -rf $(VENV) demo_out

$(RUN):
	@python=$$(tools/find_python.sh) && echo "setting up $(VENV) with $$python" && \
		"$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(DEMO_STAMP): | $(RUN)
	@echo "installing pion_dist, torch and Megatron into $(VENV) (several GB, a minute or two) ..."
	@mkdir -p $(VENV)/tmp && rm -f $(VENV)/demo-* $(VENV)/dev-*
	@$(call PIP,$(RUN)) -e '.[demo]'
	@touch $@

$(DEV_STAMP): | $(DEMO_STAMP)
	@echo "installing the development tools into $(VENV) ..."
	@$(call PIP,$(RUN)) -e '.[dev]'
	@rm -rf $(MEGATRON_018) && PIP_CONSTRAINT= $(call PIP,$(RUN)) --no-deps --target $(MEGATRON_018) \
		megatron-core==0.18.2
	@touch $@

$(TE_STAMP): | $(RUN)
	@echo "installing Transformer Engine into $(TE) (several GB; if it has to be built, 20 minutes) ..."
	@mkdir -p $(VENV)/tmp $(TE_WHEELS) && rm -rf $(TE) $(VENV)/te-[0-9]* && $(RUN) -m venv $(TE)
	@$(call PIP,$(TE)/bin/python) -e '.[dev,te-build]'
	@ls $(TE_WHEELS)/*.whl > /dev/null 2>&1 || TMPDIR="$(CURDIR)/$(VENV)/tmp" \
		NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_NO_LOCAL_VERSION=1 \
		MAX_JOBS=$${MAX_JOBS:-$$(nproc)} $(TE)/bin/python -m pip wheel --quiet --no-cache-dir \
		--no-deps --no-build-isolation --wheel-dir $(TE_WHEELS) transformer-engine-torch
	@$(call PIP,$(TE)/bin/python) --find-links $(TE_WHEELS) -e '.[te]'
	@touch $@

# The lines above "Resolved" in constraints.txt are chosen by hand; this resolves the rest anew.
FRESH := $(VENV)/constraints
constraints: PIP_CONSTRAINT := $(FRESH)/chosen.txt
constraints: PIP_BUILD_CONSTRAINT := $(FRESH)/chosen.txt
constraints: ## resolve constraints.txt anew, in a fresh environment
	@rm -rf $(FRESH) && mkdir -p $(VENV)/tmp && "$$(tools/find_python.sh)" -m venv $(FRESH)
	@sed '/^# Resolved/,$$d' constraints.txt > $(FRESH)/chosen.txt
	@$(call PIP,$(FRESH)/bin/python) -e '.[dev,te-build]' setuptools
	@{ cat $(FRESH)/chosen.txt; echo '# Resolved by `make constraints`.'; \
		$(FRESH)/bin/python -m pip freeze --all --exclude-editable --exclude pip \
		| grep -v -x -F -f $(FRESH)/chosen.txt; } > $(FRESH)/constraints.txt
	@cp $(FRESH)/constraints.txt . && rm -rf $(FRESH)
