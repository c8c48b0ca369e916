# Python 3.11 or newer is all that must be there: each target makes .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-all clean-demo

demo: $(VENV)/.installed
	@$(VENV)/bin/iwm demo

test: $(VENV)/.installed
	@$(RUN) -m pytest -n 2 --dist loadgroup -m "not slow and not gpu" -q

test-all: test
	@$(RUN) -m pytest -m slow -q
	@if $(RUN) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(RUN) -m pytest -m gpu -q; fi

# the demo keeps what it has done; this lets it start anew
clean-demo:
	rm -rf runs/demo data/demo

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; say make PYTHON=/path/to/a/newer/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
