# Every task of the project. `make help` lists them. Needed beforehand: git, make, python3-venv (Python >= 3.11).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# More options of pip for torch alone, e.g. an --index-url with CPU-only builds from pytorch.org's install page.
TORCH_ARGS ?=
# More options of pytest or of the benchmark, e.g. `make test ARGS='-k refs'`, `make bench ONLY=cat_vs_copy`.
ARGS ?=
ONLY ?=
# Of chaos and soak: which seeds, in which form (sqlite, postgres, celery), how many merges under how many faults; for how long.
SEEDS ?= 1
DATABASE ?= all
JOBS ?= 60
FAULTS ?= 30
HOURS ?= 2
# Of the service: its folder, and the server's port.
DIR ?= build/service
PORT ?= 5000

BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# The names of the stamps hold what is in the locks: another lock, another environment.
RUN_LOCKS := requirements.lock requirements-eval.lock requirements-service.lock
LIBS := .venv/stamps/libs-$(shell cat $(RUN_LOCKS) | cksum | cut -d' ' -f1)
RUN := .venv/stamps/package-$(shell cat $(RUN_LOCKS) pyproject.toml | cksum | cut -d' ' -f1)
CHAOS := OMP_NUM_THREADS=1 PYTHONPATH=tests/plugins $(BIN)/python chaos
DEV := .venv/stamps/dev-$(shell cat $(RUN_LOCKS) pyproject.toml requirements-dev.lock | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help demo article up service test golden check format bench chaos soak dev clean

help: ## list the tasks
	@sed -n 's/^\([a-z]*\):.*## /  make \1#/p' $(MAKEFILE_LIST) | awk -F'#' '{printf "%-16s%s\n", $$1, $$2}'

demo: $(RUN) ## install, then tell the whole story on shipped adapters of a real 135M model
	$(BIN)/adapterctl demo

article: $(RUN) ## do the article again: its weightings against searched ones, docs/article.md; half an hour, goes on if stopped
	$(BIN)/python bench/article.py $(ARGS)

up: $(RUN) ## serve the embedded registry and MLflow's pages on this machine (ADAPTERCTL_HOME, or the default home)
	$(BIN)/adapterctl serve

service: $(DEV) ## try the whole service on this machine: PostgreSQL, Redis, a server, workers; DIR=build/service PORT=5000
	@exec env PYTHONPATH=tests/plugins $(BIN)/python deploy/service.py --folder "$(DIR)" --port $(PORT)

# In the files' own order: xdist would keep those of few tests to the end, where the longest are, and one process would wait.
test: $(DEV) ## run the tests on two processes; ARGS goes to pytest
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

golden: $(DEV) ## write the golden files anew; look at the diff before you commit it
	$(BIN)/pytest --golden $(ARGS)
	git diff --stat -- tests

check: $(DEV) .dev/adapterctl ## ruff, mypy, import contracts; everything is told, not only the first complaint
	@failed=0; for step in "ruff check" "ruff format --check" "mypy" "lint-imports --no-cache"; do \
		echo "== $$step"; $(BIN)/$$step || failed=1; \
	done; exit $$failed

format: $(DEV) ## let ruff mend and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(DEV) ## measure; ONLY=key,key runs some
	$(BIN)/python bench/run.py $(if $(ONLY),--only $(ONLY))

chaos: $(DEV) ## kill processes while merges run, and count what is lost or doubled; SEEDS=1-4 DATABASE=celery
	$(CHAOS)/run.py --seeds $(SEEDS) --database $(DATABASE) --jobs $(JOBS) --faults $(FAULTS) \
		$(if $(ONLY),--only $(ONLY)) $(ARGS)

soak: $(DEV) ## hours of mixed load with a kill every minute; HOURS=0.5, ARGS='--database postgres'
	$(CHAOS)/soak.py --hours $(HOURS) $(ARGS)

dev: $(DEV) .dev/adapterctl ## make the environment, for editors and for work by hand
	@echo 'ready: . .venv/bin/activate'

clean: ## remove the environment and everything that was built
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# torch is installed first, for its own dependencies are not in our locks (they differ by build); ours are complete.
$(LIBS):
	@test -n "$(PYTHON)" || { echo 'no python3 found: install python3 and python3-venv' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo '$(PYTHON) is older than 3.11' >&2; exit 1; }
	@echo 'installing into .venv; the first time this takes some minutes'
	@$(PYTHON) -m venv --clear .venv || { echo 'the venv module is incomplete: apt install python3-venv' >&2; exit 1; }
	$(PIP) install $(TORCH_ARGS) $(addprefix --constraint ,$(RUN_LOCKS)) "$$(grep '^torch==' requirements-eval.lock)"
	$(PIP) install --no-deps $(addprefix --requirement ,$(RUN_LOCKS))
	@mkdir -p $(@D) && touch $@

$(RUN): $(LIBS)
	$(PIP) install --no-deps --editable .
	@touch $@

$(DEV): $(RUN)
	$(PIP) install --no-deps --requirement requirements-dev.lock
	@touch $@

.dev/adapterctl:
	@mkdir -p .dev && ln -sfn .. .dev/adapterctl
