# Each target does its own set-up: a virtual environment in .venv with the versions of
# launch/constraints.txt, made once and again when setup.py or those versions change.

# The first of these that runs and is 3.11 or later makes .venv; a pyenv shim can exist and not run.
PYTHONS ?= python3.13 python3.12 python3.11 python3
VENV ?= .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check install --quiet --constraint launch/constraints.txt
# Two workers share compiled programs through the cache in .cache; worksteal keeps a file's tests together.
PYTEST := $(PYTHON) -m pytest -q -n 2 --dist worksteal

.PHONY: help quickstart results test slow clients clean
.DELETE_ON_ERROR:

help:  ## these lines
	@sed -n 's/^\([a-z]*\):.*## /make \1 \t/p' Makefile | expand -t 20

quickstart: $(VENV)/.base  ## real text, tokenizer, a small GPT pretrained, evaluated, prompted: minutes on a CPU
	PYTHON=$(PYTHON) bash launch/quickstart.sh

results: $(VENV)/.base  ## the table of results, from data and weights that it fetches; rows that are there are kept
	$(PIP) --no-build-isolation --use-pep517 --editable '.[results,gguf]'
	$(PYTHON) -m fm_jax.results --output results

test: $(VENV)/.test  ## all tests but the slow ones
	$(PYTEST) -m "not slow" tests

slow: $(VENV)/.test  ## the slow tests
	$(PYTEST) -m slow tests

clients: $(VENV)/.test  ## tests with the openai client, lm-evaluation-harness and servers of buckets, which it installs
	$(PIP) --requirement tests/requirements_clients.txt
	$(PYTEST) tests/serve_test.py tests/lm_eval_test.py tests/evals tests/buckets_test.py

clean:  ## removes the environment and caches; keeps runs/ and data/
	rm -rf $(VENV) .cache .pytest_cache build fm_jax.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.base: setup.py launch/constraints.txt | $(VENV)/.made
	@echo "installing what fm_jax needs into $(VENV)"
	$(PIP) setuptools
	$(PIP) --no-build-isolation --use-pep517 --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@echo "installing what the tests need into $(VENV)"
	$(PIP) --no-build-isolation --use-pep517 --editable '.[test]'
	@touch $@

$(VENV)/.made:
	@for p in $(PYTHONS); do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$p; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: fm_jax needs Python 3.11 or later; none of these runs and is: $(PYTHONS)." \
	    "Install one, or name it: make PYTHONS=/path/to/python" >&2; exit 1; \
	fi; \
	if ! $$found -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	  echo "error: $$found has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	fi; \
	$$found -m venv --clear $(VENV) && touch $@
