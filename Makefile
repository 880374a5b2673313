# `make demo` and `make test` are all that a fresh machine with Python needs. VENV= and PYTHON= can be given, SITE= too.
VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed
SITE ?= site

# What runs an exported file, as on another processor: PyTorch and its oneDNN, OpenVINO's oneDNN and NumPy read these.
# ONNX Runtime has no such switch and always uses what the processor has.
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell
ONEDNN_AVX2 := ONEDNN_MAX_CPU_ISA=AVX2
SSE4 := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 OPENBLAS_CORETYPE=Nehalem \
        NPY_DISABLE_CPU_FEATURES="AVX2 FMA3"
EXPORT_TESTS := tests/export/test_export.py tests/export/test_pipeline.py tests/export/test_verify.py \
                tests/export/backends tests/export/formats tests/export/mil tests/export/quantization tests/export/browser/test_served.py \
                tests/shvit/test_deployment.py tests/shvit/test_parity.py tests/shvit/test_reference.py
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# OpenVINO 2026.4 ends this test with a segmentation fault on AMD's Zen 5, which has AVX-512, held to AVX2.
PROBE := -m pytest -q -p no:cacheprovider tests/export/test_pipeline.py -k "feature_maps and openvino"

.PHONY: demo test docs test-avx2 test-sse4 check clean

demo: $(INSTALLED)  ## train, export, verify and time on real images; writes demo/report.html
	$(BIN)/shvit demo --output demo

test: $(INSTALLED)  ## the tests, about 15 minutes on 2 slow cores
	$(BIN)/python $(PYTEST)

docs: $(INSTALLED)  ## the documentation site, strictly: site/index.html, which opens without a server or a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --site-dir $(SITE)

test-avx2: $(INSTALLED)  ## the tests of exported files as on a processor without AVX-512, AMX and bf16
	isa=$(ONEDNN_AVX2); env $(AVX2) $$isa $(BIN)/python $(PROBE) >/dev/null 2>&1 || test $$? -lt 128 || isa=; \
	test "$$isa" || echo "OpenVINO crashes on this processor when oneDNN is held to AVX2, so oneDNN is not"; \
	env $(AVX2) $$isa $(BIN)/python $(PYTEST) $(EXPORT_TESTS)

test-sse4: $(INSTALLED)  ## the same as on one without AVX, whose sums are rounded differently again
	$(SSE4) $(BIN)/python $(PYTEST) $(EXPORT_TESTS)

check: $(INSTALLED)  ## lint, format, and types of the wheel as a user gets it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build  # setuptools puts what it finds there into the wheel, files of before too
	set -e; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; mkdir "$$tmp/empty"; \
	$(BIN)/python -m build --wheel --outdir "$$tmp" . >"$$tmp/log" 2>&1 || { cat "$$tmp/log"; exit 1; }; \
	$(BIN)/python -m pip install --quiet --no-deps --target "$$tmp/site" "$$tmp"/*.whl; \
	cd "$$tmp/empty" && MYPYPATH="$$tmp/site" $(BIN)/mypy --config-file "$(CURDIR)/pyproject.toml" -p shvit

clean:  ## remove what these targets made
	rm -rf $(VENV) demo runs site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt requirements-litert.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed; say make PYTHON=python3.11") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-litert.txt
	touch $@
