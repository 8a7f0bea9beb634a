"""Run pip in another interpreter, quietly but with its errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_pip(python: str | Path, *arguments: str) -> None:
    """Run `python -m pip <arguments>`.

    Raises:
        SystemExit: pip failed; its output has been printed.
    """
    command = [str(python), "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "--no-input"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    # Drop pip's harmless warning about configured indexes that do not exist.
    errors = [line for line in result.stderr.splitlines(True) if "is ignored: it is neither" not in line]
    sys.stderr.write("".join(errors))
    if result.returncode:
        raise SystemExit(f"pip {arguments[0]} failed; see its output above.")
