"""Make what the demo and the tests run on: .venv with torch, the pack's and ComfyUI's requirements, and a ComfyUI.

    python scripts/setup_env.py

Quick the second time: a stamp in .venv holds a hash of every list of requirements. Settings, as environment variables:

    COMFYUI_PATH          use this ComfyUI instead of downloading one
    SUBJECTBOOTH_PYTHON   use this Python, as it is, instead of making .venv (that of your ComfyUI, say)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path

from get_comfyui import get_comfyui
from run_pip import run_pip

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
VENV = ROOT / ".venv"
OLDEST = CACHE / "oldest"
FRONT_END = CACHE / "front-end"
NEWEST_FRONT_END = "comfyui-frontend-package==1.58.1"
"""ComfyUI 0.3.75 brings 1.32.9; this is the newest that was seen to run on it."""

# ComfyUI's requirements that neither the demo nor the tests need: sound, and two large packages of pictures and pages
# for the editor's menus. ComfyUI runs without them and says so in its log.
NOT_NEEDED = {"torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs"}
FROM_TORCH_FILE = {"torch", "torchvision"}


@dataclass(frozen=True)
class Environment:
    """An interpreter with everything installed, and the ComfyUI tree."""

    python: Path
    comfyui: Path


def requirements(path: Path) -> list[str]:
    """The lines of a requirements file without comments."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def requirement_name(line: str) -> str:
    """ "torch==2.1" -> "torch"."""
    for i, character in enumerate(line):
        if not (character.isalnum() or character in "-_."):
            return line[:i].lower().replace("_", "-")
    return line.lower().replace("_", "-")


def ensure_environment() -> Environment:
    """Set up what is missing and say where it is."""
    if sys.version_info < (3, 10):  # noqa: UP036 - the one place that may meet an older one
        raise SystemExit(f"This needs Python 3.10 or newer; this one is {sys.version.split()[0]}.")
    own_comfyui = os.environ.get("COMFYUI_PATH")
    own_python = os.environ.get("SUBJECTBOOTH_PYTHON")
    if own_comfyui and not (Path(own_comfyui).expanduser() / "main.py").is_file():
        raise SystemExit(
            f"COMFYUI_PATH is {own_comfyui}, where no main.py is. It must be the folder of a ComfyUI."
        )
    python = Path(own_python).expanduser().absolute() if own_python else _make_venv()
    comfyui = (
        Path(own_comfyui).expanduser().resolve()
        if own_comfyui
        else get_comfyui(CACHE / "comfyui", str(python))
    )
    if not own_python:
        _install(python, comfyui)
    return Environment(python, comfyui)


def venv_python(folder: Path = VENV) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _make_venv() -> Path:
    python = venv_python()
    if not python.exists():
        print(f"Making {VENV} ...", flush=True)
        try:
            venv.create(VENV, with_pip=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"Python could not make {VENV} ({error}). On Debian: apt-get install python3-venv."
            ) from error
    return python


def _install(python: Path, comfyui: Path) -> None:
    wanted = requirements(ROOT / "requirements-torch.txt")
    wanted += [
        line
        for line in requirements(comfyui / "requirements.txt")
        if requirement_name(line) not in NOT_NEEDED | FROM_TORCH_FILE
    ]
    wanted += requirements(ROOT / "requirements.txt") + requirements(ROOT / "requirements-dev.txt")
    key = hashlib.sha256("\n".join([sys.version, *wanted]).encode("utf-8")).hexdigest()
    stamp = VENV / ".subjectbooth-stamp"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        return
    print(
        "Installing torch, ComfyUI's requirements and the pack's (some minutes the first time) ...",
        flush=True,
    )
    started = time.monotonic()
    run_pip(python, "install", *wanted)
    stamp.write_text(key, encoding="utf-8")
    print(f"Installed in {time.monotonic() - started:.0f} s.", flush=True)


def ensure_oldest(python: Path) -> Path:
    """A folder to put first on PYTHONPATH: the oldest versions that requirements.txt allows, without torch."""
    pins = [line.replace(">=", "==") for line in requirements(ROOT / "requirements.txt")]
    pins += requirements(ROOT / "requirements-oldest.txt")
    return _install_beside(python, OLDEST, pins)


def ensure_front_end(python: Path) -> Path:
    """The newest front end that is tested, to be served by ComfyUI's --front-end-root."""
    return _install_beside(python, FRONT_END, [NEWEST_FRONT_END]) / "comfyui_frontend_package" / "static"


def _install_beside(python: Path, folder: Path, pins: list[str]) -> Path:
    """These packages alone in a folder of their own, installed anew when the list has changed; the folder."""
    key = "\n".join(pins)
    stamp = folder / ".subjectbooth-stamp"
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == key):
        print(f"Installing {', '.join(pins)} into {folder}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        run_pip(python, "install", "--target", str(folder), "--no-deps", *pins)
        stamp.write_text(key, encoding="utf-8")
    return folder


if __name__ == "__main__":
    environment = ensure_environment()
    print(f"Python:  {environment.python}")
    print(f"ComfyUI: {environment.comfyui}")
