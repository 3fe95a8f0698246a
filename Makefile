# make demo: convert, train and answer with the bundled sample.   make test: all tests but slow.
# make report: the same with held-out rows, scores and an ablation, and the whole report of it.
PYTHON ?= python3
BIN := .venv/bin
# What compiling for a GPU needs of the plan extra: 1.3 GB, and nothing of their own dependencies.
PLAN := jax-cuda13-plugin jax-cuda13-pjrt nvidia-cudnn-cu13

.PHONY: setup demo report test nightly check format clean

# Both set-ups keep torch to the tested CPU build: an unpinned torch brings gigabytes of CUDA.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps $(PLAN)
	touch $@

setup: .venv/installed

demo: .venv/installed
	test -d models/sample || $(BIN)/python -m convert.from_meta
	$(BIN)/python -m train.lora --precision bf16
	$(BIN)/python -m eval.prompts

report: .venv/installed
	test -d models/sample || $(BIN)/python -m convert.from_meta
	test -d runs/report || $(BIN)/python -m train.lora --precision bf16 --val-size 40 --output-dir runs/report
	$(BIN)/python -m eval.ablate --output runs/report/ablation
	$(BIN)/python -m eval.report --run runs/report --ablation runs/report/ablation docs/results/ablation-llama-2-7b-a100-40gb

test: .venv/installed-test
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST)

nightly: .venv/installed-test
	JLLAMA_FUZZ=1 $(BIN)/python -m pytest $(PYTEST)

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv models runs build *.egg-info
