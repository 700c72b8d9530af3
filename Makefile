# make demo   the main job with nothing to download: convert a small MOSS, then chat with it, plugins included
# make test   the whole test command, on a fresh machine too: Python 3.11, g++, make and PyPI are all it needs
# make test-all   the same, and the long campaigns of damaged and hostile input: some hours
PYTHON ?= python3
VENV ?= .venv
BIN = $(abspath $(VENV))/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test test-all check unit unit-all setup test-setup clean

demo: $(VENV)/.installed
	$(BIN)/python -P -m moss_jt.demos.tour

test: check unit
test-all: check unit-all

# ruff and mypy. mypy sees an installed copy, because the checkout's folders are not where Python imports them from.
check: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build && $(PIP) install --no-deps --no-build-isolation --target build/types .
	cp pyproject.toml build/types/ && cd build/types && $(BIN)/mypy -p moss_jt

# WORKERS=2 runs two files at a time, in processes of their own; never on a card, whose memory tests measure.
WORKERS ?= 0

unit: $(VENV)/.test-installed
	@# Jittor is compiled before anything runs, and its progress is shown.
	$(BIN)/python -P -c "import moss_jt.backend.jittor"
	$(BIN)/pytest -n $(WORKERS) --dist loadfile $(TESTS)

unit-all: $(VENV)/.test-installed
	$(BIN)/pytest -m "long or not long" $(TESTS)

setup: $(VENV)/.installed
test-setup: $(VENV)/.test-installed

# Python as pyproject.toml asks for it, said before anything is installed; Jittor 1.3.11 has no newer one.
NEEDED = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
VERSION = import sys; print(*sys.version_info[:2], sep=".")

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c '$(NEEDED)' || { echo "moss-jt needs Python 3.11 or 3.12, and $(PYTHON) is $$($(PYTHON) -c '$(VERSION)' 2>&1 | tail -1). \
	Name another one: make $(or $(firstword $(MAKECMDGOALS)),demo) PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing moss-jt into $(VENV) (a minute or two)"
	@# What another Python has left in $(VENV) goes: half of it would stay, and be used.
	@if [ -e $(VENV) ] && [ "$$($(BIN)/python -c '$(VERSION)' 2>&1)" != "$$($(PYTHON) -c '$(VERSION)')" ]; then rm -rf $(VENV); fi
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" wheel
	$(PIP) install --no-build-isolation -e ".[serve]"
	touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	@echo "Installing what the tests need: torch and transformers as oracles, the CUDA compiler as a library"
	$(PIP) install --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf build $(VENV) *.egg-info
