# Every human verb of this project; `make help` lists them. Each prints the command that it runs.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
CONSTRAINTS := cluster/constraints.txt
OUT ?= out/demo
DATA ?= $(OUT)/latents
CONFIG ?=
ARGS ?=
JOB ?=
JOB_ADDRESS ?= http://127.0.0.1:8265
CLUSTER ?= aws
CLUSTER_FILE ?= cluster/$(CLUSTER).yaml

COMMANDS := make_sprites pretrain cache_latents train generate upscale edit evaluate run

.DEFAULT_GOAL := help
.PHONY: help install demo sprites-adapter ablate upscaler generate-upscale inspect test check format clean submit cluster-up cluster-down fake-cluster cluster-status dashboard $(COMMANDS)

help:  ## list the verbs
	@awk 'BEGIN {FS = ":.*## "} /^[a-z_ -]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  make COMMAND         one of: $(COMMANDS); with CONFIG=file.yaml ARGS=\"key=value ...\""

install: $(VENV)/.installed  ## create .venv with the pinned versions of everything

# torch comes first and alone: any looser request would bring gigabytes of CUDA libraries to a CPU machine.
$(VENV)/.installed: $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@

demo: install  ## the main job on a laptop: sprites -> latents -> adapter -> videos -> figures (OUT=out/demo)
	$(RUN) pipelines/make_sprites.py --config pipelines/configs/make_sprites.yaml output=$(OUT)/sprites
	$(RUN) pipelines/cache_latents.py --config pipelines/configs/cache_latents_sprites.yaml videos=$(OUT)/sprites/videos captions=$(OUT)/sprites/captions.csv output=$(OUT)/latents
	$(RUN) pipelines/train.py --config pipelines/configs/train_sprites.yaml latents=$(OUT)/latents output=$(OUT)/train
	$(RUN) pipelines/generate.py --config pipelines/configs/generate_sprites.yaml prompts=$(OUT)/sprites/prompts.csv adapter=$(OUT)/train/adapter output=$(OUT)/generated
	$(RUN) pipelines/generate.py --config pipelines/configs/generate_sprites.yaml prompts=$(OUT)/sprites/prompts.csv adapter=none max_prompts=8 output=$(OUT)/generated_base
	$(RUN) pipelines/generate.py --config pipelines/configs/generate_sprites.yaml prompts=$(OUT)/sprites/prompts.csv adapter=sprites max_prompts=8 output=$(OUT)/generated_shipped
	$(RUN) pipelines/evaluate.py --config pipelines/configs/evaluate_sprites.yaml generated=$(OUT)/generated reference=$(OUT)/generated_shipped baseline=$(OUT)/generated_base output=$(OUT)/evaluated

sprites-adapter: install  ## the adapter that the package ships as adapter=sprites, in about 90 minutes (OUT=out/demo)
	$(RUN) pipelines/make_sprites.py num_videos=6000 num_prompts=400 seed=1 output=$(OUT)/full/sprites
	$(RUN) pipelines/cache_latents.py --config pipelines/configs/cache_latents_sprites.yaml videos=$(OUT)/full/sprites/videos captions=$(OUT)/full/sprites/captions.csv output=$(OUT)/full/latents
	$(RUN) pipelines/train.py --config pipelines/configs/train_sprites_full.yaml latents=$(OUT)/full/latents output=$(OUT)/full/train
	$(RUN) pipelines/make_sprites.py --config pipelines/configs/make_sprites_hard.yaml output=$(OUT)/full/sprites_hard
	$(RUN) pipelines/cache_latents.py --config pipelines/configs/cache_latents_sprites.yaml videos=$(OUT)/full/sprites_hard/videos captions=$(OUT)/full/sprites_hard/captions.csv output=$(OUT)/full/latents_hard
	$(RUN) pipelines/train.py --config pipelines/configs/train_sprites_hard.yaml initial_adapter=$(OUT)/full/train/adapter latents=$(OUT)/full/latents_hard output=$(OUT)/full/train_hard
	$(RUN) pipelines/train.py --config pipelines/configs/train_sprites_hard.yaml initial_adapter=$(OUT)/full/train_hard/adapter latents=$(OUT)/full/latents_hard output=$(OUT)/full/train_harder seed=1

ablate: install  ## SimDA on sprites with parts left out or replaced, in hours; goes on where it was stopped (OUT=out/demo)
	$(RUN) pipelines/make_sprites.py --config pipelines/configs/make_sprites.yaml output=$(OUT)/sprites
	$(RUN) pipelines/cache_latents.py --config pipelines/configs/cache_latents_sprites.yaml videos=$(OUT)/sprites/videos captions=$(OUT)/sprites/captions.csv output=$(OUT)/latents
	$(RUN) benchmarks/ablation_sprites.py $(OUT)/latents $(OUT)/ablation $(ARGS)

upscaler: install  ## adapters of the embedded x4 upscaler, for 64 -> 256 pixels (OUT=out/demo)
	$(RUN) pipelines/make_sprites.py --config pipelines/configs/make_sprites.yaml size_px=256 num_videos=64 output=$(OUT)/sprites_256
	$(RUN) pipelines/cache_latents.py --config pipelines/configs/cache_latents_upscaler_sprites.yaml videos=$(OUT)/sprites_256/videos captions=$(OUT)/sprites_256/captions.csv output=$(OUT)/latents_256
	$(RUN) pipelines/train.py --config pipelines/configs/train_upscaler_sprites.yaml latents=$(OUT)/latents_256 output=$(OUT)/train_upscaler

generate-upscale: install  ## after demo and upscaler: new videos of 64 pixels, then the same of 256 (OUT=out/demo)
	$(RUN) pipelines/generate.py --config pipelines/configs/generate_sprites.yaml prompts=$(OUT)/sprites/prompts.csv adapter=$(OUT)/train/adapter output=$(OUT)/generated
	$(RUN) pipelines/upscale.py --config pipelines/configs/upscale_sprites.yaml videos=$(OUT)/generated adapter=$(OUT)/train_upscaler/adapter output=$(OUT)/upscaled

$(COMMANDS): install
	$(RUN) pipelines/$@.py $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

inspect: install  ## what is in a dataset of cached latents: DATA=out/demo/latents ARGS="base_model=sprites ..."
	$(RUN) pipelines/inspect_latents.py $(if $(CONFIG),--config $(CONFIG)) data=$(DATA) $(ARGS)

submit: install  ## run a pipeline as a job on a cluster, ending as it does: JOB=train CONFIG=... ARGS="..." JOB_ADDRESS=http://...
	@if ! test -f pipelines/$(JOB).py; then echo "error: JOB=$(JOB) is no command; give one of: $(COMMANDS)" >&2; exit 2; fi
	$(RUN) cluster/submit_job.py --address $(JOB_ADDRESS) -- python pipelines/$(JOB).py $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

cluster-up: install $(CLUSTER_FILE)  ## start or update a cluster: CLUSTER=aws|gcp|on_premises (or CLUSTER_FILE=mine.yaml)
	@if grep -nE '^[^#]*YOUR_' $(CLUSTER_FILE); then echo "error: replace these values in $(CLUSTER_FILE); its first lines say by what" >&2; exit 2; fi
	$(VENV)/bin/ray up --yes $(CLUSTER_FILE)

cluster-down: install $(CLUSTER_FILE)  ## end the cluster and all of its machines
	$(VENV)/bin/ray down --yes $(CLUSTER_FILE)

fake-cluster: install  ## a cluster of pretended machines on this one, to try jobs and roles; Ctrl-C ends it
	$(RUN) cluster/fake_cluster.py --dashboard-port 8265

cluster-status: install $(CLUSTER_FILE)  ## machines, resources and waiting work of the cluster
	$(VENV)/bin/ray exec $(CLUSTER_FILE) 'ray status'

dashboard: install $(CLUSTER_FILE)  ## the cluster's dashboard and job port at http://127.0.0.1:8265, through ssh, until Ctrl-C
	$(VENV)/bin/ray dashboard $(CLUSTER_FILE)

test: install  ## the tests (ARGS="tests/unit -k name" for some of them)
	$(RUN) -m pytest --numprocesses=2 --dist=loadfile $(ARGS)

check: install  ## style, types and import rules
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: install  ## format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove what the demo wrote
	rm -rf out
