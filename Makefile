# Every target sets up what it needs. `make` alone lists the targets.

VENV ?= .venv
EXTRAS ?= dev
PYTEST_ARGS ?=
PROCESSES ?= 3
SECONDS ?= 60
# The lane: 2.15 or 2.21. What the virtual environment has, else what its Python takes.
TENSORFLOW ?= $(if $(PYTHON),,$(shell \
  { read lane < $(VENV)/.tensorflow && echo "$$lane"; } 2>/dev/null))

python = $(VENV)/bin/python
comma = ,
installed = $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))-$(TENSORFLOW)

.PHONY: help setup test test-fast test-tensorflow demo bench fuzz soak lint format clean

help: ## List the targets.
	@echo 'make TARGET, where TARGET is one of'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile
	@echo 'Settings: PYTHON=python3.11 VENV=$(VENV) EXTRAS=$(EXTRAS) (dev,gpu with CUDA)'
	@echo '  TENSORFLOW=2.15 or 2.21 (without it: 2.15 with Python 3.11, else 2.21)'
	@echo '  PROCESSES=$(PROCESSES) (of the tests)'

setup: $(installed) ## Make the virtual environment with all that is needed.

test: $(installed) ## Run every test; PYTEST_ARGS="-k storage" picks some.
	$(python) -m pytest --numprocesses=$(PROCESSES) --dist=loadfile \
	  --no-loadscope-reorder $(PYTEST_ARGS)

test-fast: $(installed) ## Run the tests that start no process and train nothing.
	$(python) -m pytest --numprocesses=$(PROCESSES) --dist=loadfile \
	  --no-loadscope-reorder -m "not slow and not slurm" tests/facedist/storage \
	  tests/facedist/data tests/facedist/distributed tests/facedist/evaluation \
	  tests/tfrecords_tools tests/test_layers.py tests/test_docs.py $(PYTEST_ARGS)

# Those that touch TensorFlow, without the long ones that kill workers.
test-tensorflow: $(installed) ## Run the tests that use TensorFlow; CI does on 2.21.
	$(python) -m pytest --numprocesses=$(PROCESSES) --dist=loadfile \
	  --no-loadscope-reorder -m "not slurm and not gpu" tests/lanes \
	  tests/facedist/models tests/facedist/training tests/facedist/evaluation \
	  $(addprefix tests/facedist/data/test_,augment.py face_detection.py pipeline.py) \
	  tests/facedist/preflight tests/facedist/distributed tests/benchmarks \
	  $(addprefix tests/facedist/test_,addons.py config.py embed.py \
	    embed_on_devices.py evaluate.py export.py rewinding.py sharded_runs.py \
	    startup.py strategies.py train.py) $(PYTEST_ARGS)

demo: $(installed) ## Train on drawn faces with two workers, in under five minutes.
	$(python) launch/demo.py --output_dir=demo

bench: $(installed) ## Measure the input, the training step, the head, the builder, the evaluator.
	$(python) -m benchmarks.input_pipeline
	$(python) -m benchmarks.train_step
	$(python) -m benchmarks.head --identities=10000,100000 --batch=16 --rounds=3
	$(python) -m benchmarks.build_shards
	$(python) -m benchmarks.plan_memory
	$(python) -m benchmarks.evaluator --backbone=tinynet

fuzz: ## Look for files that end a reader, for SECONDS=60 each.
	@$(MAKE) --no-print-directory setup EXTRAS=$(EXTRAS),fuzz
	$(python) -m tests.fuzz.run --seconds=$(SECONDS)

soak: $(installed) ## Kill workers fifty times; show that no step is lost. Twenty minutes.
	$(python) launch/soak.py --kills=50

lint: $(installed) ## Check style and types.
	@failed=; \
	$(python) -m ruff check . || failed=1; \
	$(python) -m ruff format --check . || failed=1; \
	$(python) -m mypy facedist tfrecords_tools launch benchmarks || failed=1; \
	test -z "$$failed"

format: $(installed) ## Bring the code into its format.
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

clean: ## Remove the virtual environment, the demo and all caches.
	rm -rf .venv demo build dist *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first of these that is a Python of the lane; nothing but the shell's own commands
# is used, so that a machine with no Python is told so in one line.
candidates = $(or $(PYTHON),$(wildcard $(python)) python3.11 python3.13 python3.12 python3 python)
pythons = $(if $(filter 2.15,$(TENSORFLOW)),3.11,3.11 3.12 3.13)
is_of_lane = import sys; sys.exit("%d.%d" % sys.version_info[:2] not in "$(pythons)".split())
is_3_11 = import sys; sys.exit(sys.version_info[:2] != (3, 11))
python_of_lane = $(shell for name in $(candidates); do \
  if "$$name" -c '$(is_of_lane)' 2>/dev/null; then echo "$$name"; break; fi; done)
lane = $(or $(TENSORFLOW),$(shell \
  "$(found)" -c '$(is_3_11)' 2>/dev/null && echo 2.15 || echo 2.21))
has_venv = $(shell "$(found)" -c 'import ensurepip, venv' 2>/dev/null && echo yes)

space = $(subst ,, )
no_lane = TENSORFLOW=$(TENSORFLOW) must be 2.15 or 2.21
no_python = facedist needs Python $(subst $(space), or ,$(pythons)) and found none (tried: \
  $(candidates)); install it or name it with make PYTHON=/path/to/python3.11
no_venv = $(found) lacks its venv module, which facedist needs; install it (on \
  Debian and Ubuntu: apt-get install python3-venv or, for Python 3.11, python3.11-venv)

says = Setting up $(VENV) with $(found) and TensorFlow $(chosen); the first time \
  downloads about 1 GB.

$(installed): setup.py
	$(if $(filter-out 2.15 2.21,$(TENSORFLOW)),$(error $(no_lane)))
	$(eval found := $(python_of_lane))
	$(if $(found),,$(error $(no_python)))
	$(if $(has_venv),,$(error $(no_venv)))
	$(eval chosen := $(lane))
	$(info $(says))
	@$(if $(filter $(python),$(found)),:,"$(found)" -m venv "$(VENV)")
	@FACEDIST_TENSORFLOW=$(chosen) "$(python)" -m pip install -qq \
	  --disable-pip-version-check --constraint requirements/tensorflow-$(chosen).txt \
	  --editable ".[$(EXTRAS)]"
	@rm -f "$(VENV)"/.installed-*-$(filter-out $(chosen),2.15 2.21)
	@echo $(chosen) > "$(VENV)/.tensorflow"
	@: > "$(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))-$(chosen)"
