# These targets need Python 3.11 or newer. They create .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: install demo test test-all clean-demo

install: $(VENV)/.installed

demo: $(VENV)/.installed
	@$(VENV)/bin/iwm demo

test: $(VENV)/.installed
	@$(RUN) -m pytest -n 2 --dist loadgroup -m "not slow and not gpu" -q

test-all: test
	@$(RUN) -m pytest -m slow -q
	@$(RUN) -m pytest -m "hypothesis and not slow" -q --hypothesis-profile random
	@if $(RUN) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(RUN) -m pytest -m gpu -q; fi

# The demo keeps its results and resumes. This target deletes its data and its run, so that it starts from scratch.
clean-demo:
	rm -rf runs/demo data/demo

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=/path/to/a/newer/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
