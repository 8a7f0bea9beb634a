"""The lists that say the same thing in several places say the same thing."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.trainer.errors import MINIMUM_VERSIONS

ROOT = Path(__file__).resolve().parent.parent


def lines(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line for line in (raw.split("#")[0].strip() for raw in text.splitlines()) if line]


def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")))


def test_requirements_are_lower_bounds_and_the_same_everywhere() -> None:
    required = lines("requirements.txt")
    assert all(re.fullmatch(r"[a-z]+>=\d+(\.\d+)*", line) for line in required), "lower bounds only"
    assert dict(line.split(">=") for line in required) == MINIMUM_VERSIONS
    declared = project()["project"]["dependencies"]
    assert [d for d in declared if not d.startswith("comfyui-frontend-package>=")] == required


def test_registry_fields() -> None:
    """What the Comfy Registry asks for and refuses (its specification, and comfy-cli's parser)."""
    config = project()
    assert re.fullmatch(r"[a-z][a-z0-9._-]{0,99}", config["project"]["name"])
    assert "comfyui" not in config["project"]["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", config["project"]["version"])
    assert config["project"]["license"] == {"file": "LICENSE"}
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
    assert config["project"]["urls"]["Repository"].startswith("https://github.com/")
    assert config["tool"]["comfy"]["PublisherId"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", config["tool"]["comfy"]["requires-comfyui"])


def tracked(suffix: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", f"*{suffix}"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_trainer_never_imports_comfyui_or_nodes() -> None:
    """Every import in trainer/: relative inside it, the standard library, or what it is allowed to know."""
    forbidden = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "server", "nodes", "execution"}
    files = tracked(".py")
    seen = 0
    for path in files:
        if path.relative_to(ROOT).parts[0] != "trainer":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                depth = len(path.relative_to(ROOT / "trainer").parts)
                assert node.level <= depth, f"{path.name}:{node.lineno} imports from outside trainer/"
                names = [] if node.level else [str(node.module)]
            for name in names:
                assert name.split(".")[0] not in forbidden, f"{path.name}:{node.lineno} imports {name}"
            seen += len(names)
    assert seen > 10


LATE = ("lora_forward",)
"""Subclasses of PEFT's layers, imported when these are made."""


def test_trainer_imports_without_heavy_libraries() -> None:
    """In a process of its own: everything else in trainer/ imports, and brings no diffusers, peft or transformers."""
    import sys

    modules = [
        ".".join(("subjectbooth", *path.relative_to(ROOT).with_suffix("").parts))
        for path in (ROOT / "trainer").rglob("*.py")
        if path.stem not in ("__init__", "__main__", *LATE)
    ]
    code = f"""
import sys, types, importlib
package = types.ModuleType("subjectbooth")
package.__path__ = [{str(ROOT)!r}]
sys.modules["subjectbooth"] = package
for name in {modules!r}:
    importlib.import_module(name)
heavy = {{"diffusers", "peft", "transformers", "accelerate", "scipy", "torchvision", "comfy"}} & set(sys.modules)
print(sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.oldest
def test_libraries_are_the_ones_that_were_asked_for() -> None:
    """With the overlay of the oldest versions on the path, they are what gets imported."""
    import os

    overlay = os.environ.get("SUBJECTBOOTH_OVERLAY")
    if not overlay:
        pytest.skip("not the run with the oldest libraries")
    for name, minimum in MINIMUM_VERSIONS.items():
        module = importlib.import_module(name)
        assert Path(str(module.__file__)).is_relative_to(overlay)
        assert module.__version__ == minimum
