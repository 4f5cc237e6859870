# make demo: installs and runs the demo. make test: installs and runs the tests. make check: lint and types.
VENV ?= .venv
PYTHON ?= python3
ENV = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(ENV) $(VENV)/bin/finetune demo

test: $(VENV)/installed
	$(ENV) $(VENV)/bin/python -m pytest -n 2

check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

.PHONY: demo test check
