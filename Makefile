# `make demo` and `make test` are all that a fresh machine with Python needs. VENV= and PYTHON= can be given.
VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check clean

demo: $(INSTALLED)  ## train, export, verify and time on real photographs; writes demo/report.html
	$(BIN)/shvit demo --output demo

test: $(INSTALLED)  ## the tests, within 10 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)  ## lint, format, and types of the wheel as a user gets it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	set -e; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; mkdir "$$tmp/empty"; \
	$(BIN)/python -m build --wheel --outdir "$$tmp" . >"$$tmp/log" 2>&1 || { cat "$$tmp/log"; exit 1; }; \
	$(BIN)/python -m pip install --quiet --no-deps --target "$$tmp/site" "$$tmp"/*.whl; \
	cd "$$tmp/empty" && MYPYPATH="$$tmp/site" $(BIN)/mypy --config-file "$(CURDIR)/pyproject.toml" -p shvit

clean:  ## remove what these targets made
	rm -rf $(VENV) demo runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed; say make PYTHON=python3.11") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@
