# Every target sets up .venv by itself (integration: one below .venv-integration per tool). PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULTS ?= benchmarks/results
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test integration integration-mergekit integration-fusion-bench torture fuzz sanitize posing lint kernels bench spectral chart quality gpu clean

demo: $(VENV)/demo.done
	rm -rf demo
	$(BIN)/resm demo demo

test: $(VENV)/dev.done
	$(BIN)/python -m pytest

# The tools that we plug into, each in an environment of its own, since they pin what they need.
integration: integration-mergekit integration-fusion-bench

integration-fusion-bench:
	$(MAKE) VENV=$(VENV)-fusion-bench $(VENV)-fusion-bench/fusion-bench.done
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(VENV)-fusion-bench/bin/python -m pytest tests/integration/test_fusion_bench.py

MERGEKITS := 0.1.4 0.1.5
INTEGRATION := .venv-integration
integration-mergekit: $(MERGEKITS:%=$(INTEGRATION)/mergekit-%.done)
	for version in $(MERGEKITS); do \
	    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 RESM_MERGEKIT=$$version \
	    $(INTEGRATION)/mergekit-$$version/bin/python -m pytest tests/integration/test_mergekit.py || exit 1; \
	done

# About four minutes: a process killed, a file layer failing, power cut, bytes flipped.
torture: $(VENV)/dev.done
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -s --show-capture=no tests/torture.py

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The GPU's tests and its suite without one: on devices that the CPU poses as, streams watched.
posing: $(VENV)/dev.done
	RESM_TEST_DEVICE=posing OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
	$(BIN)/python -m pytest -n 2 tests/test_posing.py tests/test_gpu.py tests/test_gpu_kernels.py

# Every kernel configuration, ahead of time, for sm_80, sm_90, sm_100 and gfx942; needs no GPU.
kernels: $(VENV)/dev.done
	$(BIN)/python -m benchmarks.compile

# The extension and the fake cuSOLVER under AddressSanitizer and UBSan; about 40 s of one core.
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -O0
sanitize: $(VENV)/dev.done
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py --quiet build_ext --build-lib build/sanitize --build-temp build/sanitize/objects
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 CXXFLAGS="$(SANITIZE)" \
	RESM_TEST_EXTENSION="$$(echo build/sanitize/resm_kernels/_cusolver.*.so)" \
	$(BIN)/python -m pytest --capture=sys -p no:cacheprovider tests/test_cusolver.py

# Seconds for each of the eleven targets; needs a Python that atheris has wheels for (3.11 to 3.13).
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/fuzz.done
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) --work build/fuzz

bench: $(VENV)/dev.done
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks --benchmark-columns=min,median,rounds --benchmark-group-by=group

# Needs fusion-bench in the environment for its peer column: pip install fusion-bench.
spectral: $(VENV)/dev.done
	for what in accuracy workspace layer checkpoint batches; do \
	    OPENBLAS_NUM_THREADS=1 $(BIN)/python -m benchmarks.spectral $$what || exit 1; \
	done

# On a machine with an NVIDIA GPU, with the torch that is installed there; under nine minutes.
gpu:
	$(PYTHON) -m benchmarks.gpu.run --out $(RESULTS)

# Trains, merges and scores small models: about an hour and a half on two cores; goes on where it was stopped.
quality: $(VENV)/dev.done
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality

chart: $(VENV)/dev.done
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m benchmarks.chart

clean:
	rm -rf $(VENV) $(VENV)-* demo build *.egg-info resm_kernels/_cusolver.*.so

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.done: $(VENV)/bin/python pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PIP) --editable '.[$*]'
	touch $@

# mergekit's own tests are in its source release only.
$(INTEGRATION)/mergekit-%.done: tests/integration/mergekit-%.txt pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(INTEGRATION)/mergekit-$*
	$(INTEGRATION)/mergekit-$*/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable . --requirement $<
	$(INTEGRATION)/mergekit-$*/bin/python -m pip --disable-pip-version-check download --quiet --no-deps --no-binary mergekit --dest $(INTEGRATION) mergekit==$*
	tar -xzf $(INTEGRATION)/mergekit-$*.tar.gz -C $(INTEGRATION)/mergekit-$*
	touch $@
