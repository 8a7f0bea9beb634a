"""What scripts/setup_env.py installs, and the environment that a ComfyUI of one's own gets on top of .venv."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NEWER = """# as a newer ComfyUI lists them
comfyui-frontend-package==1.49.6
comfyui-workflow-templates==0.11.44
torch
torchvision
torchaudio
Comfy_Kitchen==0.2.31  # comment
SQLAlchemy>=2.0.0
"""


@pytest.fixture
def setup_env(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("setup_env")


def test_torch_stays_as_pinned_and_nothing_a_comfyui_imports_is_left_out(setup_env: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text(NEWER, encoding="utf-8")
    wanted = setup_env.base_requirements() + setup_env.comfyui_requirements(tmp_path)
    found = [line for line in wanted if line.startswith("torch")]
    assert [line.split("==")[0] for line in found] == ["torch", "torchvision", "torchaudio"], "each once, with its pin"
    assert all("==" in line for line in found)
    assert wanted[-3:] == ["comfyui-frontend-package==1.49.6", "Comfy_Kitchen==0.2.31", "SQLAlchemy>=2.0.0"]


def test_a_list_with_less_in_it_is_installed_too(setup_env: ModuleType, tmp_path: Path) -> None:
    """.venv serves with COMFYUI_PATH and without: neither undoes what the other has set up."""
    stamp = tmp_path / "stamp"
    assert not setup_env.is_installed(stamp, ["a"])
    stamp.write_text("a\nb==1", encoding="utf-8")
    assert setup_env.is_installed(stamp, ["b==1"])
    assert not setup_env.is_installed(stamp, ["b==2"])
    assert not setup_env.is_installed(stamp, ["a", "c"])


def test_an_environment_above_has_what_is_below_and_its_own_first(setup_env: ModuleType, tmp_path: Path) -> None:
    below = setup_env.make_overlay_environment(Path(sys.executable), tmp_path / "bélow")
    above = setup_env.make_overlay_environment(below, tmp_path / "above")

    def packages(python: Path) -> Path:
        return Path(setup_env._evaluate(python, "sysconfig.get_path('purelib')"))

    for python, name, says in ((below, "both", "below"), (above, "both", "above"), (below, "only_below", "below")):
        (packages(python) / f"subjectbooth_{name}.py").write_text(f"said = {says!r}", encoding="utf-8")

    def said(python: Path, name: str) -> str:
        code = f"from subjectbooth_{name} import said; print(said)"
        return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()

    assert [said(above, "both"), said(below, "both"), said(above, "only_below")] == ["above", "below", "below"]
    prefix = setup_env._evaluate(above, "sys.prefix")
    assert Path(prefix).resolve() == (tmp_path / "above").resolve(), "what is installed goes there"


def test_the_ui_gets_the_newest_tested_front_end(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only in the ComfyUI that is downloaded for it; and without a network, with that ComfyUI's own."""
    asked = []

    def install(python: Path, folder: Path, pins: list[str]) -> Path:
        asked.append(pins)
        return folder

    def fail(*_: object) -> Path:
        raise SystemExit("pip install failed; see its output above.")

    monkeypatch.setattr(setup_env, "_install_separately", install)
    python = Path(sys.executable)
    ours = setup_env.Environment(python, setup_env.CACHE / "comfyui")
    static = setup_env.FRONT_END / "comfyui_frontend_package" / "static"
    assert setup_env.front_end_flags(ours) == ["--front-end-root", str(static)]
    assert asked == [[setup_env.NEWEST_FRONT_END]]
    assert setup_env.front_end_flags(setup_env.Environment(python, tmp_path)) == []
    monkeypatch.setattr(setup_env, "_install_separately", fail)
    assert setup_env.front_end_flags(ours) == []
