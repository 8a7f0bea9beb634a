"""Make what the demo and the tests run on: .venv with torch, the pack's and ComfyUI's requirements, and a ComfyUI.

    python scripts/setup_env.py

Quick the second time: a stamp lists the requirements that were installed. Settings, as environment variables:

    COMFYUI_PATH          use this ComfyUI instead of downloading one. It gets an environment of its own in .cache, with
                          what .venv lacks for it; .venv, with torch in it, stays as it is
    SUBJECTBOOTH_PYTHON   use this Python, as it is, instead of making .venv (that of your ComfyUI, say)
"""

from __future__ import annotations

import hashlib
import os
import platform
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
STAMP = ".subjectbooth-stamp"
OLDEST = CACHE / "oldest"
FRONT_END = CACHE / "front-end"
NEWEST_FRONT_END = "comfyui-frontend-package==1.58.1"
"""ComfyUI 0.3.75 brings 1.32.9; this is the newest that was seen to run on it."""

# ComfyUI's requirements that neither the demo nor the tests need: two large packages of pictures and pages for the
# editor's menus. ComfyUI runs without them and says so in its log.
NOT_NEEDED = {"comfyui-workflow-templates", "comfyui-embedded-docs"}


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
        raise SystemExit(f"COMFYUI_PATH is {own_comfyui}, where no main.py is. It must be the folder of a ComfyUI.")
    if own_python:
        python = Path(own_python).expanduser().absolute()
    else:
        python = _make_venv()
    if own_comfyui:
        comfyui = Path(own_comfyui).expanduser().resolve()
        if not own_python:
            _install(python, VENV / STAMP, base_requirements())
            python = _environment_above(python, comfyui)
    else:
        comfyui = get_comfyui(CACHE / "comfyui", str(python))
        if not own_python:
            _install(python, VENV / STAMP, base_requirements() + comfyui_requirements(comfyui))
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


def base_requirements() -> list[str]:
    """What is needed whichever ComfyUI is used. torch comes first: its pins hold for whatever else is installed."""
    names = ("requirements-torch.txt", "requirements.txt", "requirements-dev.txt")
    return [line for name in names for line in requirements(ROOT / name)]


def comfyui_requirements(comfyui: Path) -> list[str]:
    """What this ComfyUI asks for besides, without what torch's own list pins."""
    pinned = {requirement_name(line) for line in requirements(ROOT / "requirements-torch.txt")}
    return [
        line for line in requirements(comfyui / "requirements.txt") if requirement_name(line) not in NOT_NEEDED | pinned
    ]


def is_installed(stamp: Path, wanted: list[str]) -> bool:
    """Whether all of this was installed before. More may have been: .venv also serves without COMFYUI_PATH."""
    return stamp.is_file() and set(wanted) <= set(stamp.read_text(encoding="utf-8").splitlines())


def _install(python: Path, stamp: Path, wanted: list[str]) -> None:
    lines = [f"# Python {platform.python_version()}", *wanted]
    if is_installed(stamp, lines):
        return
    print(
        "Installing torch, ComfyUI's requirements and the pack's (some minutes the first time) ...",
        flush=True,
    )
    started = time.monotonic()
    run_pip(python, "install", *wanted)
    stamp.write_text("\n".join(lines), encoding="utf-8")
    print(f"Installed in {time.monotonic() - started:.0f} s.", flush=True)


def _environment_above(python: Path, comfyui: Path) -> Path:
    """The Python of a ComfyUI of its own: it has what .venv has, and on top of it what this ComfyUI wants otherwise."""
    name = f"{comfyui.name}-{hashlib.sha256(str(comfyui).encode('utf-8')).hexdigest()[:8]}"
    folder = CACHE / "environments" / name
    wanted = base_requirements() + comfyui_requirements(comfyui)
    lines = [f"# on {python}, {_ask(python, 'sys.version')}", *wanted]
    if not is_installed(folder / STAMP, lines):
        started = time.monotonic()
        print(f"Installing what {comfyui} needs besides into {folder} ...", flush=True)
        above = make_environment_above(python, folder)
        run_pip(above, "install", *wanted)
        (folder / STAMP).write_text("\n".join(lines), encoding="utf-8")
        print(f"Installed in {time.monotonic() - started:.0f} s.", flush=True)
    return venv_python(folder)


def make_environment_above(python: Path, folder: Path) -> Path:
    """A new environment that finds what the one of `python` has, pip included; its Python.

    What is installed into it comes first, and pip takes nothing away from the one below, as with
    --system-site-packages, which reaches only the Python that both were made from.
    """
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([str(python), "-m", "venv", "--without-pip", str(folder)], check=True)
    above = venv_python(folder)
    below = _ask(python, "sysconfig.get_path('purelib')")
    # A line of code and not the bare path: in which encoding a path is read depends on system and version.
    line = f"import sys; sys.path.append({below!a})\n"
    (Path(_ask(above, "sysconfig.get_path('purelib')")) / "below.pth").write_text(line, encoding="ascii")
    return above


def _ask(python: Path, expression: str) -> str:
    code = f"import sys, sysconfig; sys.stdout.buffer.write(({expression}).encode('utf-8'))"
    answer = subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.PIPE)
    return " ".join(answer.stdout.decode("utf-8").split("\n"))


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
    stamp = folder / STAMP
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
