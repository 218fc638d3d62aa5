# Each target does its own set-up on a machine with Python 3.11+, pip and make; run twice, it reuses the environment.
PYTHON ?= python3
VENV ?= .venv

demo: $(VENV)/.core
	$(VENV)/bin/useg demo

test: $(VENV)/.dev
	PATH="$(abspath $(VENV))/bin:$$PATH" scripts/check

# the tests that have a long form, in it: hours of damaged files and the like
soak: $(VENV)/.dev
	USEG_SOAK=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --durations=0 $$(grep -rl --include="test_*.py" USEG_SOAK tests)

# the documentation, into site/: a stale page, a dead link or a reference to nothing fails
docs: $(VENV)/.docs
	$(VENV)/bin/python scripts/generate_docs.py --check
	$(VENV)/bin/python scripts/draw_architecture.py --check
	$(VENV)/bin/python scripts/render_tutorial.py --check
	$(VENV)/bin/python -m sphinx -q -E -W --keep-going -b html docs site
	$(VENV)/bin/python scripts/check_links.py site
	@echo open site/index.html

# runs docs/tutorial.py, and stores what it prints and draws: minutes
tutorial: $(VENV)/.dev
	$(VENV)/bin/python scripts/render_tutorial.py --run

# wheel and source distribution, into dist/, tried in an empty environment: two or three minutes
dist:
	PYTHON="$(PYTHON)" scripts/dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) demo dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis

.PHONY: demo test soak docs tutorial dist clean
