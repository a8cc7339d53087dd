# make demo: sets up .venv and runs the whole chain on the tiny model.
# make test: sets up .venv and runs linters, type checks and all tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint install browser clean

demo: install
	$(BIN)/trtkit demo

# One thread each for torch: two processes with two would wait for each other.
test: install browser lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/installed

# The marker is written last, so an interrupted installation is done again.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[local,torch,test,peer]'
	touch $@

# The load-test report is tested in a real browser. Root on a Debian-like system gets one here, others are told how.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; false \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	     && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
	|| echo "no Chromium: install it, or set TRTKIT_NO_BROWSER=1 to leave the report's browser test out"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis trtkit-demo
