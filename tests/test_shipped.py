"""What the Comfy Registry serves is small, and holds everything that the pack needs at run time."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

from subjectbooth.tests.conftest import ROOT
from subjectbooth.tests.shipped import copy_shipped, shipped_files

MOST_BYTES = 16_400_000

# In a process that finds the package at argv[1] alone: import all that needs no ComfyUI, write the demo base out (its
# bytes are hashed, and not kept), and tell where everything came from.
_USE = """
import importlib, json, os, sys, types
from pathlib import Path
root = Path(sys.argv[1])
package = types.ModuleType("subjectbooth")
package.__path__ = [str(root)]
sys.modules["subjectbooth"] = package
for path in sorted([*root.glob("trainer/**/*.py"), *root.glob("demo/**/*.py")]):
    if path.stem not in ("__init__", "__main__"):
        importlib.import_module(".".join(("subjectbooth", *path.relative_to(root).with_suffix("").parts)))
base = sys.modules["subjectbooth.demo.base"]
with open(os.devnull, "wb") as stream:
    written = base.write_checkpoint(base.read_packed(), stream)
modules = {name: module.__file__ for name, module in sys.modules.items() if name.startswith("subjectbooth.")}
print(json.dumps({
    "weights": base.sha256_of(base.WEIGHTS), "checkpoint": written, "manifest": base.manifest(), "modules": modules,
}))
"""


@pytest.fixture(scope="module")
def files() -> set[str]:
    return set(shipped_files())


def test_the_package_is_small(files: set[str]) -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in files}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:8]
    assert sum(sizes.values()) <= MOST_BYTES, {name: sizes[name] for name in largest}


def test_what_only_developers_need_is_left_out(files: set[str]) -> None:
    folders = {PurePosixPath(name).parts[0] for name in files}
    assert not folders & {"tests", "scripts", "benchmarks", ".github", ".ci", ".gitignore", "Makefile"}
    assert not [name for name in files if name.startswith("demo/making/")]


def test_names_are_plain(files: set[str]) -> None:
    """comfy-cli takes git's list as it is printed, where a name in quotes is that of no file."""
    assert not [name for name in files if not name.isascii() or '"' in name]


def test_the_programs_of_the_pack_find_each_other(files: set[str]) -> None:
    """Imports inside functions too: relative ones lead to files that ship, no others to folders of this repository."""
    own = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"nodes"}  # ComfyUI has a `nodes` of its own
    seen = 0
    for name in sorted(files):
        if not name.endswith(".py"):
            continue
        path = PurePosixPath(name)
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & own, f"{name}:{node.lineno}"
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert str(node.module).split(".")[0] not in own, f"{name}:{node.lineno}"
            elif isinstance(node, ast.ImportFrom):
                start = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                places = [start, *(start / alias.name for alias in node.names)]
                modules = [module for place in places for module in (f"{place}.py", f"{place}/__init__.py")]
                found = {module for module in modules if (ROOT / module).is_file()}
                assert found and found <= files, f"{name}:{node.lineno} imports {found - files or node.module}"
                seen += 1
    assert seen > 300


def test_what_the_programs_read_ships(files: set[str]) -> None:
    """Everything under the folders that ComfyUI and the nodes read, with a picture for each example."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    folders = ("nodes", "trainer", "js", "locales", "example_workflows", "subgraphs", "demo/weights", "demo/subjects")
    for folder in folders:
        there = {name for name in tracked if name.startswith(f"{folder}/") and (ROOT / name).is_file()}
        assert there and there <= files, folder
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "NOTICE", "README.md"} <= files
    assert {name for name in tracked if name.startswith("demo/LICENSES/")} <= files
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown and set(shown) <= files
    samples = {PurePosixPath(name).parts[2] for name in files if name.startswith("demo/subjects/")}
    for example in (name for name in files if re.fullmatch(r"example_workflows/[^/]+\.json", name)):
        assert f"{example[:-5]}.jpg" in files
        for node in json.loads((ROOT / example).read_text(encoding="utf-8"))["nodes"]:
            if node["type"] == "LoadSubjectImages":
                assert node["widgets_values"][2] in samples | {"none"}, example


def test_the_unpacked_package_imports_and_writes_the_demo_base(tmp_path: Path) -> None:
    root = copy_shipped(tmp_path / "SubjectBooth")
    done = subprocess.run([sys.executable, "-c", _USE, str(root)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["manifest"] == {"weights": report["weights"], "checkpoint": report["checkpoint"]}
    assert len(report["modules"]) > 60
    assert all(Path(file).is_relative_to(root) for file in report["modules"].values() if file)
