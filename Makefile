# A thin wrapper around scripts/*.py, which work on every system: on Windows run `python scripts\demo.py` and so on.
# COMFYUI_PATH=... uses an existing ComfyUI, with a separate environment; SUBJECTBOOTH_PYTHON=... an existing Python.
PYTHON ?= python3

.PHONY: help setup demo ui test test-oldest test-editor test-newest soak lint clean

help:
	@echo "make demo         train and sample in a real ComfyUI; results go to demo_output/"
	@echo "make ui           the same ComfyUI with the newest tested front end, left running for a browser"
	@echo "make test         all tests, including those in a real ComfyUI"
	@echo "make test-oldest  tests with the oldest supported libraries"
	@echo "make test-editor  tests in the graph editor, with a newer front end than ComfyUI's own"
	@echo "make test-newest  tests of nodes and panels in the ComfyUI at COMFYUI_PATH, such as a checkout of its master"
	@echo "make soak         kill runs at random, try 10,000 malformed inputs, run 50 trainings in one ComfyUI; takes hours"
	@echo "make lint         style, types and which package may import which"
	@echo "make setup        only set up what the other targets need (.venv, .cache)"
	@echo "make clean        remove .venv, .cache and demo_output"

setup:
	@$(PYTHON) scripts/setup_env.py

demo:
	@$(PYTHON) scripts/demo.py

ui:
	@$(PYTHON) scripts/demo.py --ui

test:
	@$(PYTHON) scripts/run_tests.py

test-oldest:
	@$(PYTHON) scripts/run_tests.py --oldest

test-editor:
	@$(PYTHON) scripts/run_tests.py --editor

test-newest:
	@$(PYTHON) scripts/run_tests.py --comfyui

soak:
	@$(PYTHON) tests/soak

lint:
	@$(PYTHON) scripts/lint.py

clean:
	@$(PYTHON) scripts/clean.py
