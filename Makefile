# `make` or `make help` lists the targets. Each does all the set-up that it needs in .venv, once.
#
#   ARGS="..."      more arguments for the command, as in  make train ARGS="optimizer=racs trainer.steps=50"
#   JOBS=2          test processes at a time, of one thread each
#   SYSTEM=1        use this machine's python3 and its packages, install nothing (clusters, ROCm, Colab, containers)
#   PYTHON=...      another Python (3.11 to 3.13) for .venv, or for SYSTEM=1
#   PIP_ARGS="..."  options for pip while installing, such as an index that has CPU builds of torch

PYTHON ?=
SYSTEM ?=
ARGS ?=
JOBS ?= 2
PIP_ARGS ?=
export PYTHON SYSTEM PIP_ARGS

ifeq ($(SYSTEM),1)
RUN := $(or $(PYTHON),python3)
else
RUN := .venv/bin/python
endif
SETUP := @scripts/setup.sh requirements.txt
SETUP_DEV := @scripts/setup.sh requirements.txt requirements-dev.txt requirements-oracles.txt

.DEFAULT_GOAL := help
.PHONY: help setup train test compare survey bench tables fisher lint wheel sample clean

help:
	@echo 'make train     pretrain a small LLaMA with Alice on the embedded text    3 to 7 minutes on 2 CPU cores'
	@echo 'make test      prove the parts                                           9 to 13 minutes on 2 CPU cores'
	@echo 'make compare   Adam, Muon, RACS and Alice on grids of rates, one figure  seconds: the records are there;'
	@echo '               anew: ARGS="--out runs/compare"                           about 2 hours on 2 CPU cores'
	@echo 'make survey    every method at four pairs of rates, 100 steps each       seconds, or about 2 hours, likewise'
	@echo 'make bench     speed of ours beside other packages: steps, training      15 minutes or more'
	@echo 'make tables    every table and figure of the paper again, from records   1 minute'
	@echo 'make fisher    how well each structure fits real gradients               about 7 minutes on 2 CPU cores'
	@echo 'make setup     only the installation that the others begin with          2 to 10 minutes, once'
	@echo 'make lint      ruff and mypy                                             1 minute'
	@echo 'make wheel     the optimizers alone, as dist/racs_alice-*.whl            10 seconds'
	@echo
	@echo 'The first of them installs into .venv (log: .venv/setup.log). Download: about 3 GB on Linux, because PyPI'"'"'s torch'
	@echo 'comes with CUDA; 0.6 GB on macOS, or with a CPU build of torch: PIP_ARGS="--index-url <index of CPU builds>".'
	@echo 'After that none of these downloads anything.'
	@echo
	@echo 'ARGS="optimizer=racs"  more arguments for train, test, compare    PYTHON=python3.12  another Python, 3.11 to 3.13'
	@echo 'SYSTEM=1               use the python3 that is there with its packages, install nothing'

setup:
	$(SETUP_DEV)

train:
	$(SETUP)
	@$(RUN) train.py experiment=quickstart $(ARGS)

test:
	$(SETUP_DEV)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

compare:
	$(SETUP)
	@$(RUN) scripts/sweep.py compare $(ARGS)

survey:
	$(SETUP)
	@$(RUN) scripts/sweep.py all $(ARGS)

bench:
	$(SETUP_DEV)
	@$(RUN) scripts/benchmark.py all $(ARGS)
	@$(RUN) scripts/tables.py

tables:
	$(SETUP)
	@$(RUN) scripts/tables.py $(ARGS)
	@$(RUN) scripts/fair_report.py $(filter --check,$(ARGS))

fisher:
	$(SETUP)
	@$(RUN) scripts/fisher_report.py $(ARGS)

lint:
	$(SETUP_DEV)
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

wheel:
	$(SETUP_DEV)
	@rm -rf build racs_alice.egg-info
	@$(RUN) -m pip wheel . --quiet --no-deps --no-build-isolation --wheel-dir dist
	@rm -rf build racs_alice.egg-info
	@ls dist/racs_alice-*.whl

sample:
	$(SETUP)
	@$(RUN) scripts/build_sample.py
	@$(RUN) scripts/build_tokenizers.py

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
