# Each target sets up what it needs; the machine needs Python 3.11 or newer, pip and make. A second
# call reuses the environment.
PYTHON ?= python3
VENV ?= .venv

demo: $(VENV)/.core
	$(VENV)/bin/useg demo

test: $(VENV)/.dev
	PATH="$(abspath $(VENV))/bin:$$PATH" scripts/check

# Tests that also have a long form, in that form: hours of damaged files and the like. Where there is
# no atheris for this Python, the readers are not fuzzed by coverage.
soak: $(VENV)/.dev
	-$(VENV)/bin/python -m pip install -q -c constraints.txt atheris
	USEG_SOAK=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --durations=0 \
		$$(grep -rl --include="test_*.py" USEG_SOAK tests)

# Build the documentation into site/; a stale page, a dead link or an unresolved reference fails.
docs: $(VENV)/.docs
	$(VENV)/bin/python scripts/generate_docs.py --check
	$(VENV)/bin/python scripts/draw_architecture.py --check
	$(VENV)/bin/python scripts/render_tutorial.py --check
	$(VENV)/bin/python -m sphinx -q -E -W --keep-going -b html docs site
	$(VENV)/bin/python scripts/check_links.py site
	@echo open site/index.html

# Run docs/tutorial.py and store what it prints and draws; takes minutes.
tutorial: $(VENV)/.dev
	$(VENV)/bin/python scripts/render_tutorial.py --run

# Build wheel and source distribution into dist/ and try them in an empty environment; takes two or
# three minutes.
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
