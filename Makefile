# Every target makes what it needs: .venv first, then the packages, once.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
SEEDS  ?= 1
WORKERS ?= 2
CPU_INDEX := https://download.pytorch.org/whl/cpu
BIN := .venv/bin
HIDDEN := ['[0-9][0-9]_*.py', '__pycache__', '*.pyc']
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: help play train align test test-full test-slurm lab export book site film bench bench-gpu aot mutants clean

help:
	@echo "make play       a small model in your browser: type a text and follow its tokens"
	@echo "make train      train a small DeepSeek-V3 on this machine, then see runs/tiny*/report.html"
	@echo "make align      then teach it to answer, and improve it by its own answers: SFT, rewards, GRPO"
	@echo "make lab        open the notebooks in JupyterLab"
	@echo "make test       the short tests (minutes)   make test-full   all of them (up to an hour)"
	@echo "make test-slurm the cluster launchers on a real Slurm of two nodes, started on this machine"
	@echo "make bench      speed and memory beside transformers, as a table and runs/bench.json"
	@echo "make bench-gpu  every Triton kernel on this NVIDIA GPU, against its yardsticks and limits"
	@echo "make aot        compile every kernel for Hopper and Blackwell, no GPU needed: registers, spills, memory"
	@echo "make mutants    change one operator or number at a time: do the tests notice? (hours; ARGS=FILE for one)"
	@echo "make export     notebooks -> dsv3_ref/*.py  make book        run the notebooks, store them, build the site"
	@echo "make film       record figures/play.gif, the page of make play, with Chromium"
	@echo "make site       the book to read offline, from the stored notebooks: build/site/index.html"

play: .venv/core
	@mkdir -p build
	$(BIN)/dsv3 explain notebooks/models/tiny --out build/explainer.html $(ARGS)
	@$(BIN)/python -m webbrowser -t build/explainer.html >/dev/null || true  # where there is a browser

train: .venv/core
	$(BIN)/dsv3 train $(ARGS)

align: .venv/rl
	$(BIN)/dsv3 align --seeds $(SEEDS) $(ARGS)

lab: .venv/lab
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" --ContentsManager.hide_globs="$(HIDDEN)" \
	  --LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb $(ARGS)

test: .venv/dev
	$(BIN)/python -m pytest -n $(WORKERS)

test-full: .venv/dev
	$(BIN)/python -m pytest -n $(WORKERS) --full

test-slurm: .venv/dev
	@tests/slurm_local.sh install || true  # it says why; the tests are then skipped
	DSV3_SLURM=1 $(BIN)/python -m pytest tests/cluster/test_slurm.py -rs

bench: .venv/dev
	$(BIN)/dsv3 bench $(ARGS)

bench-gpu: .venv/dev
	$(BIN)/python -m dsv3_ref.kernels.bench $(ARGS)

aot: .venv/dev
	$(BIN)/python tools/aot.py $(ARGS)

mutants: .venv/dev
	$(PIP) -e ".[mutation]"
	$(BIN)/python tools/mutation.py $(ARGS)

export: .venv/dev
	$(BIN)/python tools/export.py

book: .venv/dev
	$(BIN)/python tools/export.py
	$(BIN)/python tools/book.py $(CHAPTERS)
	$(BIN)/python tools/website.py

site: .venv/book
	$(BIN)/python tools/website.py

film: .venv/dev
	$(BIN)/python tools/record.py

clean:
	rm -rf .venv

# ── Installation ──
# torch first: with an NVIDIA GPU the newest ordinary wheel; without one a CPU build. Where the
# package index would bring CUDA libraries along, torch comes from PyTorch's own CPU index instead.
.venv/torch:
	@test -x $(BIN)/python || { echo "· creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "· installing PyTorch"
	@if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then $(PIP) "torch>=2.11,<3"; \
	elif $(BIN)/pip install --dry-run --disable-pip-version-check "$(TORCH)" 2>/dev/null | grep -q "nvidia-"; \
	then $(PIP) "$(TORCH)" --index-url $(CPU_INDEX); \
	else $(PIP) "$(TORCH)"; fi
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && ! $(BIN)/python -c "import triton" 2>/dev/null; then \
	$(PIP) "$(TRITON)"; fi  # a CPU build of torch brings none
	@touch $@

.venv/core: .venv/torch pyproject.toml
	@echo "· installing dsv3_ref"
	@$(PIP) -e .
	@touch $@

.venv/rl: .venv/core
	@echo "· installing problems to practice on"
	@$(PIP) -e ".[rl]"
	@touch $@

.venv/lab: .venv/core
	@echo "· installing JupyterLab"
	@$(PIP) -e ".[lab]"
	@mkdir -p .venv/share/jupyter/lab/settings  # no question about news at the first start
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' \
	  > .venv/share/jupyter/lab/settings/overrides.json
	@touch $@

.venv/book: .venv/core
	@echo "· installing Sphinx and MathJax"
	@$(PIP) -e ".[book]"
	@touch $@

.venv/dev: .venv/core
	@echo "· installing what the tests need"
	@$(PIP) -e ".[dev]"
	@touch $@
