# make demo: convert, train and answer with the bundled sample.   make test: all tests but slow.
# make demo-smollm2: the same with a real chat model of 135 million parameters, and its exports in transformers.
# make report: the same with held-out rows, scores and an ablation, and the whole report of it.
# make docs-reports: the three reports and the screens in docs/ anew; ASSETS has stories260K-meta/ and alpaca/.
# make docs: the documentation as pages, in build/site.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu: torch from there, without the libraries of a GPU.
PYTHON ?= python3
BIN := .venv/bin
# The tested versions; jax 0.11 left Python 3.11 behind.
PINS := pins/$(shell $(PYTHON) -c 'import sys; print("3.11" if sys.version_info < (3, 12) else "3.12")')
# What holds for a base in codes as for weights as they are.
OF_ANY_BASE := tests/test_step.py tests/test_adapter.py tests/test_generate.py tests/test_run.py
ASSETS ?= ../shared/assets
PLANNED := docs/results/ablation-llama-2-7b-a100-40gb
PIP = $(BIN)/python -m pip install --disable-pip-version-check

SMOLLM2_ROWS ?= jllama/sample/train.json

.PHONY: setup demo demo-smollm2 report report-alpaca docs docs-reports test test-3.12 nightly check format clean

# torch alone comes from TORCH_INDEX: such an index has copies of other packages, too.
.venv/made: pyproject.toml $(PINS).txt
	$(PYTHON) -m venv .venv
	$(PIP) -q -c $(PINS).txt pip
	$(if $(TORCH_INDEX),$(PIP) -c $(PINS).txt --no-deps --index-url $(TORCH_INDEX) torch)
	touch $@

.venv/installed: .venv/made
	$(PIP) -c $(PINS).txt -e .
	touch $@

.venv/installed-test: .venv/made $(PINS)-plan.txt
	$(PIP) -c $(PINS).txt -e ".[test]"
	$(PIP) --no-deps -r $(PINS)-plan.txt
	touch .venv/installed $@

.venv/installed-docs: .venv/installed
	$(PIP) -c $(PINS).txt -e ".[docs]"
	touch $@

# Without torch, whose build on PyPI brings gigabytes of CUDA, and so without what needs it.
.venv-3.12/installed: pyproject.toml pins/3.12.txt pins/3.12-plan.txt
	python=$$(.ci/python 3.12) && $$python -m venv .venv-3.12
	grep -vE '^(torch|peft|accelerate|bitsandbytes)==' pins/3.12.txt | .venv-3.12/bin/python -m pip install -q --no-deps -r /dev/stdin
	.venv-3.12/bin/python -m pip install -q --no-deps -r pins/3.12-plan.txt -e .
	touch $@

setup: .venv/installed

demo: .venv/installed
	test -d models/sample || $(BIN)/python -m convert.from_meta
	$(BIN)/python -m train.lora --precision bf16
	$(BIN)/python -m eval.prompts

# The wheel and the models stay in models/, the run in runs/smollm2: what is there is not made again.
demo-smollm2: .venv/installed-test
	test -d models/smollm2-hf || $(BIN)/python docs/site/smollm2.py models/smollm2-hf
	test -d models/smollm2 || $(BIN)/python -m convert.from_hf models/smollm2-hf models/smollm2
	$(BIN)/python -m convert.verify models/smollm2 --against models/smollm2-hf
	test -d runs/smollm2 || $(BIN)/python -m train.lora --config train/recipes/smollm2.yaml --data $(SMOLLM2_ROWS) --output-dir runs/smollm2
	test -f runs/smollm2/generations.jsonl || $(BIN)/python -m eval.prompts --run runs/smollm2 --prompts eval/report_prompts.json --temperature 0
	$(BIN)/python -m eval.report --run runs/smollm2
	test -d models/smollm2-tuned-hf || $(BIN)/python -m convert.to_hf models/smollm2 models/smollm2-tuned-hf --adapter runs/smollm2/adapter --dtype fp32
	$(BIN)/python docs/site/in_transformers.py runs/smollm2 models/smollm2-hf models/smollm2-tuned-hf

report: .venv/installed
	test -d models/sample || $(BIN)/python -m convert.from_meta
	test -d runs/report || $(BIN)/python -m train.lora --precision bf16 --val-size 40 --output-dir runs/report
	$(BIN)/python -m eval.ablate --remat none,block --repeats 1 --accuracy-steps 40 --output runs/report/ablation
	$(BIN)/python -m eval.report --run runs/report --ablation runs/report/ablation $(PLANNED)

# The original report's recipe and rows, on a small real model, beside the original's figures.
report-alpaca: .venv/installed
	test -d models/stories260k || $(BIN)/python -m convert.from_meta $(ASSETS)/stories260K-meta models/stories260k
	test -d runs/alpaca || $(BIN)/python -m train.lora --config train/recipes/report.yaml --model models/stories260k \
		--data $(ASSETS)/alpaca/alpaca_data_200.json --max-seq-len 512 --skip-bad-rows 200 --val-size 20 --output-dir runs/alpaca
	$(BIN)/python -m eval.report --run runs/alpaca --ablation $(PLANNED) --reference original $(ASSETS)/../report/prompts.json

docs-reports: report report-alpaca demo-smollm2
	mkdir -p docs/report docs/report-alpaca docs/report-smollm2
	cp runs/report/report*.* docs/report
	cp runs/alpaca/report*.* docs/report-alpaca
	cp runs/smollm2/report*.* docs/report-smollm2
	$(BIN)/python docs/site/screens.py

# Into build/site; a link that leads nowhere is an error.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu" $(PYTEST)

test-3.12: .venv-3.12/installed
	.venv-3.12/bin/python -m pytest -n 2 --dist worksteal -m "not integration and not slow and not gpu" $(PYTEST)
	.venv-3.12/bin/python -m pytest -n 2 -m "not slow" -k 7b tests/test_plan.py
	.venv-3.12/bin/python -m pytest -n 2 -k "int4 or nf4" tests/test_mesh.py

nightly: .venv/installed-test
	.ci/resolve
	JLLAMA_FUZZ=1 $(BIN)/python -m pytest $(PYTEST)
	for base in int8 int4 nf4; do $(BIN)/python -m pytest -n 2 -m "not slow" --base $$base $(OF_ANY_BASE) || exit 1; done

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-3.12 models runs build *.egg-info
