# Every target first makes the virtual environment .venv, with the exact versions of
# constraints.txt.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help demo test browser system check prose bench soak nemesis read-large big-tree flicker failover forget pressure pictures site worker beat flower lint types docs clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready ## Measure Python's standard library with a self-splitting job on an embedded server
	@$(BIN)/celery -A rlm_tasks rlm demo $(ARGS)

test: $(VENV)/.ready ## Run all tests, with a real server and real workers
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(ARGS)

browser: $(VENV)/.ready ## Test Flower's pages in Chromium, which must be installed
	$(BIN)/python -m pytest tests/browser $(ARGS)

system: $(VENV)/.ready ## Test jobs over RabbitMQ, which must be installed
	$(BIN)/python -m pytest tests/system $(ARGS)

check: lint types prose docs ## Run CI's checks before the tests: lint, types, prose, docs

lint: $(VENV)/.ready ## Check style and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready ## Check types, strictly
	$(BIN)/mypy

prose: $(VENV)/.ready ## Check sentences: subject, formula, length (ARGS=docs/guide.md also lists long ones)
	$(BIN)/python -m docs.prose $(ARGS)

docs: $(VENV)/.ready ## Check that generated pages are up to date, and build the site (ARGS=--write updates them)
	$(BIN)/python -m docs.generate $(ARGS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

site: $(VENV)/.ready ## Serve the documentation on http://127.0.0.1:8001
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8001

bench: $(VENV)/.ready ## Measure against hand-written programs, such as plain Celery, and print the table
	$(BIN)/python -m tests.bench $(ARGS)

soak: $(VENV)/.ready ## Kill, stop and restart everything at random for SOAK_S (600) seconds and print the jobs' results; then use up a provider's limits for four minutes each, and make 10,000 decisions in busy processes
	$(BIN)/python -m tests.faults.soak $(ARGS)
	$(BIN)/python -m tests.faults.guards --window 60
	$(BIN)/python -m tests.faults.guards --decisions 10000

nemesis: $(VENV)/.ready ## Run N (1000) random histories from SEED (1): lost, late and refused calls, restarts, clocks that move
	$(BIN)/python -m tests.faults.nemesis --histories $(or $(N),1000) --seed $(or $(SEED),1) $(ARGS)

read-large: $(VENV)/.ready ## Read a text file of MB (10240) megabytes, and print the memory of the worker's processes
	$(BIN)/python -m tests.faults.read_large --mb $(or $(MB),10240)

flicker: $(VENV)/.ready ## Let Redis refuse writes: for moments, 30 s with each of 10 seeds, then full at each crash point
	$(BIN)/python -m tests.faults.outages flicker $(ARGS)

failover: $(VENV)/.ready ## Move the primary 20 times while the old one lives on as a replica
	$(BIN)/python -m tests.faults.outages failover --runs 20 $(ARGS)

forget: $(VENV)/.ready ## Let the network forget all connections, ten times
	$(BIN)/python -m tests.faults.outages forget $(ARGS)

big-tree: $(VENV)/.ready ## Write a job of a million nodes, and measure what a look at it costs (ARGS="--nodes 100000")
	$(BIN)/python -m tests.faults.big_tree $(ARGS)

pressure: $(VENV)/.ready ## Overload two slots for a minute, and draw docs/pressure.svg
	$(BIN)/python docs/examples/under_pressure.py --out docs/pressure.json $(ARGS)
	$(BIN)/python -m docs.plot_pressure

pictures: $(VENV)/.ready ## Draw the pictures of Flower's pages in docs/, with Chromium
	$(BIN)/python -m docs.pictures $(ARGS)

worker: $(VENV)/.ready ## Start a worker on RLM_REDIS_URL
	$(BIN)/celery -A rlm_tasks worker -l info $(ARGS)

beat: $(VENV)/.ready ## Start Celery beat on RLM_REDIS_URL
	$(BIN)/celery -A rlm_tasks beat -l info $(ARGS)

flower: $(VENV)/.ready ## Start Flower on http://127.0.0.1:5555
	$(BIN)/celery -A rlm_tasks flower --address=127.0.0.1 $(ARGS)

clean: ## Remove the virtual environment and all files that tools have left
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
