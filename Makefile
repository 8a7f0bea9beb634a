# Thin over scripts/*.py, which are the same on every system: on Windows run `python scripts\demo.py` and so on.
# COMFYUI_PATH=... uses an existing ComfyUI, with an environment of its own; SUBJECTBOOTH_PYTHON=... an existing Python.
PYTHON ?= python3

.PHONY: help setup demo ui test test-oldest test-editor test-newest soak lint clean

help:
	@echo "make demo         train and sample in a real ComfyUI; the results go to demo_output/"
	@echo "make ui           the same ComfyUI, left running for a browser"
	@echo "make test         all tests, those in the real ComfyUI included"
	@echo "make test-oldest  the tests that also run with the oldest allowed libraries"
	@echo "make test-editor  the tests in the graph editor, with a newer front end than ComfyUI's own"
	@echo "make test-newest  the tests of nodes and panels in the ComfyUI that COMFYUI_PATH names, such as a checkout of its master"
	@echo "make soak         kill trainings again and again, try 10,000 strange inputs, run 50 trainings in one ComfyUI: hours"
	@echo "make lint         style, types and which package may import which"
	@echo "make setup        only set up what the others need (.venv, .cache)"
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
