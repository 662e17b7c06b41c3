# `make` alone lists what there is. Each environment is made once and again whenever its requirements change.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
SERVE_VENV := .venv-serve
DEV_VENV := .venv
BENCH_VENV := .venv-bench
CHECKPOINT ?= artefacts/reference
MODEL ?= grpc://127.0.0.1:8001
# perf_analyzer is a program that tritonclient's wheels carried up to 2.60.0; this one's runs with the libraries in nvidia-pytriton.
PERF_ANALYZER = --no-deps --target $(@D)/perf_analyzer tritonclient==2.51.0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help serve test check train evaluate export engine bench report capacity bench-compare clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'

$(SERVE_VENV)/.ready: requirements-serve.txt constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "Python %d.%d came, expected 3.10, 3.11 or 3.12: make serve PYTHON=python3.11" % v)'
	@echo "Installing requirements-serve.txt into $(SERVE_VENV) (once) ..."
	@$(PYTHON) -m venv --clear $(SERVE_VENV)
	@$(SERVE_VENV)/bin/pip install --quiet -r requirements-serve.txt -c constraints.txt
	@touch $@

$(DEV_VENV)/.ready: requirements.txt requirements-bench.txt requirements-serve.txt constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "Python %d.%d came, expected 3.10, 3.11 or 3.12: make test PYTHON=python3.11" % v)'
	@echo "Installing requirements.txt into $(DEV_VENV) (once, a few minutes) ..."
	@$(PYTHON) -m venv --clear $(DEV_VENV)
	@$(DEV_VENV)/bin/pip install --quiet -r requirements.txt -c constraints.txt
	@$(DEV_VENV)/bin/pip install --quiet $(PERF_ANALYZER)
	@touch $@

$(BENCH_VENV)/.ready: requirements-bench.txt requirements-serve.txt constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "Python %d.%d came, expected 3.10, 3.11 or 3.12: make bench PYTHON=python3.11" % v)'
	@echo "Installing requirements-bench.txt into $(BENCH_VENV) (once) ..."
	@$(PYTHON) -m venv --clear $(BENCH_VENV)
	@$(BENCH_VENV)/bin/pip install --quiet -r requirements-bench.txt -c constraints.txt
	@$(BENCH_VENV)/bin/pip install --quiet $(PERF_ANALYZER)
	@touch $@

serve: $(SERVE_VENV)/.ready ## Serve the model on 127.0.0.1 (HTTP_PORT=8000 GRPC_PORT=8001 METRICS_PORT=8002 SERVE_ARGS=--help)
	@exec $(SERVE_VENV)/bin/python serve.py $(SERVE_ARGS)

test: $(SERVE_VENV)/.ready $(DEV_VENV)/.ready ## Run the whole default suite, real Triton included (PYTEST_ARGS=...)
	@SERVE_PYTHON=$(abspath $(SERVE_VENV))/bin/python $(DEV_VENV)/bin/python -m pytest $(PYTEST_ARGS)

check: $(DEV_VENV)/.ready ## Lint and types
	@$(DEV_VENV)/bin/ruff format --check .
	@$(DEV_VENV)/bin/ruff check .
	@$(DEV_VENV)/bin/mypy
	@# Triton calls both files model.py, so each is checked by itself, with its step's folder on the path.
	@for step in tokenizer classifier; do MYPYPATH=model_repository/$$step $(DEV_VENV)/bin/mypy \
	  --no-explicit-package-bases --no-namespace-packages model_repository/$$step/1/model.py || exit 1; done

train: $(DEV_VENV)/.ready ## Fine-tune (CONFIG=training/configs/smoke.yaml TRAIN_ARGS="-o ...")
	@$(DEV_VENV)/bin/python -m training.train --config $(or $(CONFIG),training/configs/smoke.yaml) $(TRAIN_ARGS)

evaluate: $(DEV_VENV)/.ready ## Score MODEL (checkpoint, .onnx or URL) on DATA, or on two examples (EVALUATE_ARGS=--help)
	@$(DEV_VENV)/bin/python -m training.evaluate --model-path $(MODEL) \
	  $(if $(DATA),--data $(DATA),--examples "Amazing movie!" "Terrible film.") $(EVALUATE_ARGS)

export: $(DEV_VENV)/.ready ## Export CHECKPOINT to ONNX, check parity, install the int8 model (DATA=... EXPORT_ARGS="--install fp16")
	@$(DEV_VENV)/bin/python -m export.onnx --checkpoint $(CHECKPOINT) $(if $(DATA),--calibration-data $(DATA) --data $(DATA)) $(EXPORT_ARGS)

engine: ## On a GPU node: build the TensorRT engine from ONNX and CHECKPOINT in the export image (DATA=folder ENGINE_ARGS=...)
	@[ -z "$(DATA)" ] || [ -d "$(DATA)" ] || { echo "DATA=$(DATA) is no folder, expected one with train.* and test.*"; exit 2; }
	@. docker/.env && docker build -q -f docker/Dockerfile.export --build-arg TRITON_RELEASE=$$TRITON_RELEASE -t sentiment-export . >/dev/null
	@docker run --rm --gpus all -v "$(CURDIR):/work" $(if $(DATA),-v "$(abspath $(DATA)):/data:ro") --user "$$(id -u):$$(id -g)" \
	  -e HOME=/tmp sentiment-export \
	  --onnx $(or $(ONNX),$(CHECKPOINT)/onnx/fp16/model.onnx) --checkpoint $(CHECKPOINT) $(if $(DATA),--data /data) \
	  --config model_repository/classifier/configs/tensorrt.pbtxt $(ENGINE_ARGS)

bench: $(BENCH_VENV)/.ready ## Load-test against the promise (PROFILE=smoke|slo|sweep|soak, the last three also as slo-without-vnni, ...; BENCH_ARGS=...)
	@$(BENCH_VENV)/bin/python -m benchmarks.bench --profile $(or $(PROFILE),smoke) $(BENCH_ARGS)

report: $(BENCH_VENV)/.ready ## Turn a load test's raw files into report.html and plots (RESULTS=folder, default the newest)
	@$(BENCH_VENV)/bin/python -m benchmarks.report $(RESULTS)

capacity: $(BENCH_VENV)/.ready ## Replicas for RATE requests a second, from a sweep (RESULTS=folder, default the newest)
	@$(BENCH_VENV)/bin/python -m benchmarks.capacity --rate $(or $(RATE),1000) $(if $(RESULTS),--results $(RESULTS))

# Each peer in an environment of its own, since their dependencies conflict. One that cannot be made is left out.
PEERS := fastapi litserve ray bentoml
PEER_ENVIRONMENTS := $(PEERS:%=.venv-peer-%/.ready)

.venv-peer-%/.ready: benchmarks/peers/requirements-%.txt benchmarks/peers/requirements-base.txt constraints.txt
	@echo "Installing benchmarks/peers/requirements-$*.txt into .venv-peer-$* (once, a few minutes) ..."
	@$(PYTHON) -m venv --clear .venv-peer-$*
	@.venv-peer-$*/bin/pip install --quiet -r benchmarks/peers/requirements-$*.txt
	@touch $@

# The torch peers need a checkpoint: CHECKPOINT if it is named, else one made from the shipped model.
SHIPPED := artefacts/shipped
PEER_CHECKPOINT := $(if $(filter-out file,$(origin CHECKPOINT)),$(CHECKPOINT),$(SHIPPED))

$(SHIPPED)/model.safetensors: model_repository/classifier/1/model.onnx | $(DEV_VENV)/.ready
	@echo "Making $(SHIPPED) from the shipped model ..."
	@rm -rf $(SHIPPED)
	@$(DEV_VENV)/bin/python -m export.checkpoint --output $(SHIPPED)

bench-compare: $(BENCH_VENV)/.ready $(PEER_CHECKPOINT)/model.safetensors ## This service beside LitServe, Ray Serve, ... (COMPARE_ARGS=--quick)
	-@$(MAKE) --no-print-directory --keep-going $(PEER_ENVIRONMENTS)
	@$(BENCH_VENV)/bin/python -m benchmarks.compare --serve-python $(BENCH_VENV)/bin/python --checkpoint $(PEER_CHECKPOINT) $(COMPARE_ARGS)

clean: ## Delete the environments and caches (never artefacts)
	rm -rf $(SERVE_VENV) $(DEV_VENV) $(BENCH_VENV) .venv-peer-* .pytest_cache .mypy_cache .ruff_cache .hypothesis
