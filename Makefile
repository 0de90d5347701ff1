# make round       set up and run one full DPO round   (EXTRA=gpu on a GPU machine; CONFIG=pipelines/x.yaml; ARGS="--rounds 2")
# make test        set up and run the tests
# make test-slow   the slow tests alone
# make chaos       kill processes, nodes and networks under whole rounds, and print what each fault cost
# make check       format, lint and types
EXTRA ?= cpu
CONFIG ?= pipelines/quickstart.yaml
ARGS ?=
PY := .venv/bin/python
READY := .venv/.ready-$(EXTRA)

.PHONY: round test test-slow chaos check setup
round: setup
	$(PY) pipelines/full_round.py $(CONFIG) $(ARGS)

test: setup
	$(PY) -m pytest -m "not slow and not gpu and not chaos" $(ARGS)

test-slow: setup
	$(PY) -m pytest -m "slow and not gpu and not chaos" $(ARGS)

chaos: setup
	$(PY) -m pytest tests/chaos -m chaos $(ARGS)

check: setup
	$(PY) -m ruff format --check . && $(PY) -m ruff check . && $(PY) -m pyright

setup: $(READY)

$(READY): pyproject.toml cluster/setup.sh cluster/cpu-overrides.txt
	sh cluster/setup.sh $(EXTRA)
	@touch $@
