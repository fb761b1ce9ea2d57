# `make star` in a fresh clone: installs what is missing into .venv and finds a star model of scikit-learn's digits.
# Another Python, or another torch than the pinned one, has an environment of its own: `make test PYTHON=python3.12`
# uses .venv-3.12, `make test PYTHON=python3.12 TORCH=2.11.0` .venv-3.12-torch2.11.0.
VENV := .venv$(if $(PYTHON),-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))$(if $(TORCH),-torch$(TORCH))
BIN := $(VENV)/bin
PINS := requirements.txt setup.py tools/install.sh tools/build_ffcv.sh

.PHONY: star install quick test test-all rehearse smoke check docs format bench-all clean

star: $(VENV)/.installed
	$(BIN)/fastar train-star --dataset digits

install: $(VENV)/.installed

# The tests are shared by so many processes: one for each core that may be used, and 8 at most, since each takes about a
# gigabyte of memory. `make test PROCESSES=0` runs them in pytest's own.
PROCESSES := $(shell n=$$(env -u OMP_NUM_THREADS nproc || echo 2); echo $$((n < 8 ? n : 8)))
# worksteal: neighbours stay together, so that what a module's tests share is made in one process, rarely in two.
SHARED := -n $(PROCESSES) --dist=worksteal

# One thread: the tests' networks are small, and threads that wait for each other cost more than they save. Compiled
# modules are kept whatever the caller's environment says: tests start hundreds of processes.
TESTED := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=

test: $(VENV)/.dev
	$(TESTED) $(BIN)/python -m pytest $(SHARED)

test-all: $(VENV)/.dev
	$(TESTED) $(BIN)/python -m pytest $(SHARED) -m 'slow or not slow'

# The invariants alone, in under a minute on two cores: what to run after each change.
quick: $(VENV)/.dev
	$(TESTED) $(BIN)/python -m pytest $(SHARED) -m quick

# The tests marked gpu, on a simulated one where there is none (tools/rehearse.py).
rehearse: $(VENV)/.dev
	$(TESTED) $(BIN)/python tools/rehearse.py python -m pytest -m gpu $(SHARED)

# Every shipped configuration from end to end at the smallest scale, on made images.
smoke: $(VENV)/.installed
	$(TESTED) $(BIN)/python tools/smoke.py

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation as a site, in build/docs; a link that leads nowhere is an error.
docs: $(VENV)-docs/.installed
	$(VENV)-docs/bin/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Every claim of speed beside its peer, in under 20 minutes on two idle cores: the table of docs/benchmarks.md.
# `make bench-all PARTS="matching step-2"` measures some of them again.
bench-all: $(VENV)/.bench
	$(BIN)/python tools/bench_all.py $(if $(PARTS),--only $(PARTS))

# An environment of its own: the site's tools are no part of what the tests run with.
$(VENV)-docs/.installed: requirements-docs.txt
	$(or $(PYTHON),python3) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip --disable-pip-version-check install -q -r requirements-docs.txt
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs build dist fastar.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: $(PINS)
	sh tools/install.sh $(VENV)
	@touch $@

$(VENV)/.dev: $(VENV)/.installed requirements-dev.txt tools/install_torchvision.sh tools/install_browser.sh
	$(BIN)/python -m pip --disable-pip-version-check install -q -r requirements-dev.txt
	sh tools/install_torchvision.sh $(VENV)
	sh tools/install_browser.sh
	@touch $@

$(VENV)/.bench: $(VENV)/.installed requirements-bench.txt
	$(BIN)/python -m pip --disable-pip-version-check install -q --no-deps -r requirements-bench.txt
	@touch $@
