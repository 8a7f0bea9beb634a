"""The pack as the Comfy Registry serves it: what git tracks, without what .comfyignore names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from subjectbooth.tests.conftest import ROOT


def shipped_files() -> list[str]:
    """Paths from the root, as comfy-cli's `node publish` chooses them. Skips the test outside of a git checkout.

    comfy-cli asks a plain `git ls-files` and leaves out what the patterns match, in gitignore's syntax; a tracked file
    that .gitignore alone names is packed all the same.
    """
    ignored = set(_git_files("-ci", "--exclude-from=.comfyignore"))
    return [name for name in _git_files() if name not in ignored and (ROOT / name).is_file()]


def copy_shipped(target: Path) -> Path:
    """Unpack those files under *target*, as ComfyUI-Manager does from the Registry."""
    for name in shipped_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target / name)
    return target


def _git_files(*options: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *options], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.splitlines()
