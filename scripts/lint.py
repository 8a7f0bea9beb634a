"""Style and types: ruff over everything, mypy over the packages.

python scripts/lint.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from comfy_server import link_directory
from setup_env import CACHE, ROOT, ensure_environment

# The repo root is a package under a name that only ComfyUI gives it. mypy needs one: a link of that name.
ALIAS = CACHE / "mypy"
PACKAGES = ("trainer", "nodes", "demo", "benchmarks")
SCRIPTS = sorted((ROOT / "scripts").glob("*.py")) + sorted((ROOT / "tests" / "soak").glob("[!t]*.py"))


def main() -> int:
    python = str(ensure_environment().python)
    link_directory(ROOT, ALIAS / "subjectbooth")
    present = [name for name in PACKAGES if any((ROOT / name).glob("*.py"))]
    packages = [argument for name in present for argument in ("-p", f"subjectbooth.{name}")]
    config = str(ROOT / "pyproject.toml")
    mypy = [python, "-m", "mypy", "--config-file", config, "--cache-dir", str(CACHE / "mypy_cache")]
    checks: list[tuple[str, list[str], Path]] = [
        ("ruff", [python, "-m", "ruff", "check", "."], ROOT),
        ("mypy, the packages", [*mypy, *packages], ALIAS),
        ("mypy, the scripts", [*mypy, *map(str, SCRIPTS)], ROOT / "scripts"),
    ]
    failed = []
    for name, command, folder in checks:
        print(f"--- {name}", flush=True)
        env = {**os.environ, "MYPYPATH": os.pathsep.join((str(folder), str(ROOT / "tests")))}
        if subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL).returncode:
            failed.append(name)
    if failed:
        print(f"Failed: {', '.join(failed)}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
