"""pip in another interpreter, quietly, with its errors kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_pip(python: str | Path, *arguments: str) -> None:
    """Run `python -m pip <arguments>`.

    Raises:
        SystemExit: pip failed; what it said has been printed.
    """
    command = [str(python), "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "--no-input"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    # pip warns about every package that a configured index does not have; that is no news.
    said = [line for line in result.stderr.splitlines(True) if "is ignored: it is neither" not in line]
    sys.stderr.write("".join(said))
    if result.returncode:
        raise SystemExit(f"pip {arguments[0]} failed; its message is above.")
