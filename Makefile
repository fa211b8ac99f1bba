# Everything starts here; all that is needed is make and a Python of at least 3.11.
#   make PYTHON=python3.12 VENV=other-folder ...   chooses the interpreter and where the environment goes
VENV ?= .venv
RUN = $(abspath $(VENV))/bin/python

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow lab docs-readme clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env: ## the environment in .venv (minutes the first time, nothing afterwards)
	@for p in $(or $(PYTHON),"$(VENV)/bin/python" python3 python3.13 python3.12 python3.11); do \
		if command -v "$$p" >/dev/null && $(if $(PYTHON),true,"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null); \
		then exec "$$p" .ci/env.py "$(VENV)" $(if $(PYTHON),--asked); fi; done; \
	echo "$(if $(PYTHON),$(PYTHON) was not found,no Python of at least 3.11 was found): choose one with make PYTHON=/path/to/python3.12" >&2; exit 1

demo: env ## train on moving scenes, decompose and score them (once)
	@"$(RUN)" .ci/demo.py

test: env ## everything that must hold: notebooks, package, README, tests, wheel
	@"$(RUN)" .ci/test.py

test-slow: env ## the tests that learn, and the cells marked slow
	@"$(RUN)" .ci/test.py slow

lab: env ## JupyterLab in that environment
	@"$(RUN)" -m jupyterlab --LabApp.default_url=/lab/tree/nbs/index.ipynb

docs-readme: env ## README.md from nbs/index.ipynb
	@"$(RUN)" .ci/readme.py

clean: ## caches and builds; data, runs and the environment stay
	rm -rf build dist _docs _proc .pytest_cache .hypothesis
	find nbs slotnb tests .ci -depth \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
