# make demo: installs and runs the demo. make test: installs and runs the tests. make check: lint and types.
# make coverage: the tests that are not marked slow, with the lines they run. make docs: the documentation site, in site/.
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
	$(ENV) $(VENV)/bin/python -m pytest -n 2 --dist worksteal --durations=30 --durations-min=10

check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

coverage: $(VENV)/installed
	$(ENV) $(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not slow" --cov=finetune --cov=data_tools

$(VENV)/docs: $(VENV)/installed
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[docs]"
	touch $@

docs: $(VENV)/docs
	PATH="$(VENV)/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

.PHONY: demo test check coverage docs
