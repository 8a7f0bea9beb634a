"""Set up the environment of the demo and the tests: .venv with torch and all requirements, and a ComfyUI.

    python scripts/setup_env.py

A second run is fast: a stamp file lists the installed requirements. Environment variables:

    COMFYUI_PATH          use this ComfyUI instead of downloading one. It gets its own environment in .cache, on top of
                          .venv, which stays unchanged
    SUBJECTBOOTH_PYTHON   use this Python as it is (such as your ComfyUI's) instead of creating .venv
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
"""ComfyUI 0.3.75 comes with 1.32.9; this is the newest version known to work with it."""

# Requirements of ComfyUI that neither the demo nor the tests need: two large packages of images and help pages.
# ComfyUI runs without them and logs a warning.
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
    """Set up what is missing; returns the paths."""
    if sys.version_info < (3, 10):  # noqa: UP036 - scripts may be started with an older Python
        raise SystemExit(f"Python 3.10 or newer is required; this is {sys.version.split()[0]}.")
    own_comfyui = os.environ.get("COMFYUI_PATH")
    own_python = os.environ.get("SUBJECTBOOTH_PYTHON")
    if own_comfyui and not (Path(own_comfyui).expanduser() / "main.py").is_file():
        raise SystemExit(f"COMFYUI_PATH ({own_comfyui}) has no main.py. Set it to a ComfyUI folder.")
    if own_python:
        python = Path(own_python).expanduser().absolute()
    else:
        python = _make_venv()
    if own_comfyui:
        comfyui = Path(own_comfyui).expanduser().resolve()
        if not own_python:
            _install(python, VENV / STAMP, base_requirements())
            python = _overlay_environment(python, comfyui)
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
        print(f"Creating {VENV} ...", flush=True)
        try:
            venv.create(VENV, with_pip=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"Creating {VENV} failed ({error}). On Debian: apt-get install python3-venv.") from error
    return python


def base_requirements() -> list[str]:
    """Requirements that do not depend on ComfyUI. torch comes first, so that its pins apply to all other packages."""
    names = ("requirements-torch.txt", "requirements.txt", "requirements-dev.txt")
    return [line for name in names for line in requirements(ROOT / name)]


def comfyui_requirements(comfyui: Path) -> list[str]:
    """This ComfyUI's requirements, without those pinned in requirements-torch.txt."""
    pinned = {requirement_name(line) for line in requirements(ROOT / "requirements-torch.txt")}
    return [
        line for line in requirements(comfyui / "requirements.txt") if requirement_name(line) not in NOT_NEEDED | pinned
    ]


def is_installed(stamp: Path, wanted: list[str]) -> bool:
    """Whether all of this is installed. The stamp may list more: .venv is also used without COMFYUI_PATH."""
    return stamp.is_file() and set(wanted) <= set(stamp.read_text(encoding="utf-8").splitlines())


def _install(python: Path, stamp: Path, wanted: list[str]) -> None:
    lines = [f"# Python {platform.python_version()}", *wanted]
    if is_installed(stamp, lines):
        return
    print(
        "Installing torch and the requirements of ComfyUI and the pack (a few minutes the first time) ...",
        flush=True,
    )
    started = time.monotonic()
    run_pip(python, "install", *wanted)
    stamp.write_text("\n".join(lines), encoding="utf-8")
    print(f"Installed in {time.monotonic() - started:.0f} s.", flush=True)


def _overlay_environment(python: Path, comfyui: Path) -> Path:
    """The Python for a given ComfyUI: an environment with its requirements on top of .venv."""
    name = f"{comfyui.name}-{hashlib.sha256(str(comfyui).encode('utf-8')).hexdigest()[:8]}"
    folder = CACHE / "environments" / name
    wanted = base_requirements() + comfyui_requirements(comfyui)
    lines = [f"# on {python}, {_evaluate(python, 'sys.version')}", *wanted]
    if not is_installed(folder / STAMP, lines):
        started = time.monotonic()
        print(f"Installing the other requirements of {comfyui} into {folder} ...", flush=True)
        overlay = make_overlay_environment(python, folder)
        run_pip(overlay, "install", *wanted)
        (folder / STAMP).write_text("\n".join(lines), encoding="utf-8")
        print(f"Installed in {time.monotonic() - started:.0f} s.", flush=True)
    return venv_python(folder)


def make_overlay_environment(python: Path, folder: Path) -> Path:
    """Create an environment on top of the one of `python`, whose packages (and pip) it can use; returns its Python.

    Packages installed into it take precedence, and pip changes nothing in the lower one. This is like
    --system-site-packages, which only works for the Python that a venv was created from, not for another venv.
    """
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([str(python), "-m", "venv", "--without-pip", str(folder)], check=True)
    overlay = venv_python(folder)
    lower = _evaluate(python, "sysconfig.get_path('purelib')")
    # A line of code instead of the bare path, because the encoding of paths in .pth files varies.
    line = f"import sys; sys.path.append({lower!a})\n"
    (Path(_evaluate(overlay, "sysconfig.get_path('purelib')")) / "below.pth").write_text(line, encoding="ascii")
    return overlay


def _evaluate(python: Path, expression: str) -> str:
    code = f"import sys, sysconfig; sys.stdout.buffer.write(({expression}).encode('utf-8'))"
    answer = subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.PIPE)
    return " ".join(answer.stdout.decode("utf-8").split("\n"))


def ensure_oldest(python: Path) -> Path:
    """A folder for PYTHONPATH with the oldest versions that requirements.txt allows, without torch."""
    pins = [line.replace(">=", "==") for line in requirements(ROOT / "requirements.txt")]
    pins += requirements(ROOT / "requirements-oldest.txt")
    return _install_separately(python, OLDEST, pins)


def ensure_front_end(python: Path) -> Path:
    """The folder of the newest tested front end, for ComfyUI's --front-end-root."""
    return _install_separately(python, FRONT_END, [NEWEST_FRONT_END]) / "comfyui_frontend_package" / "static"


def front_end_flags(environment: Environment) -> list[str]:
    """ComfyUI's arguments for the newest tested front end. A ComfyUI of the user's keeps the one that it came with."""
    if environment.comfyui.resolve() != (CACHE / "comfyui").resolve():
        return []
    try:
        return ["--front-end-root", str(ensure_front_end(environment.python))]
    except SystemExit as error:  # pip failed: no network, for example
        print(f"{error} ComfyUI's own front end is used instead of {NEWEST_FRONT_END}.", file=sys.stderr)
        return []


def _install_separately(python: Path, folder: Path, pins: list[str]) -> Path:
    """Install only these packages into a separate folder, again if the list has changed; returns the folder."""
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
