"""Lint: ruff on everything, mypy and import-linter on the packages.

python scripts/lint.py
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from comfy_server import link_directory
from setup_env import CACHE, ROOT, ensure_environment

# Checkouts may share .cache but not these files, so the name depends on the checkout's path.
SCRATCH = CACHE / "lint" / f"{ROOT.name}-{hashlib.sha256(str(ROOT).encode('utf-8')).hexdigest()[:8]}"
# The repo root is a package without a fixed name, but mypy needs one: a link named `subjectbooth`.
ALIAS = SCRATCH / "whole"
# import-linter would read all files below the root, including .venv and .cache, so it gets links to the packages only.
PARTS = SCRATCH / "parts"
PACKAGES = ("trainer", "nodes", "demo", "benchmarks")
SCRIPTS = sorted((ROOT / "scripts").glob("*.py")) + sorted((ROOT / "tests" / "soak").glob("[!t]*.py"))
IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def main() -> int:
    python = str(ensure_environment().python)
    present = [name for name in PACKAGES if any((ROOT / name).glob("*.py"))]
    link_directory(ROOT, ALIAS / "subjectbooth")
    for name in present:
        link_directory(ROOT / name, PARTS / "subjectbooth" / name)
    packages = [argument for name in present for argument in ("-p", f"subjectbooth.{name}")]
    config = str(ROOT / "pyproject.toml")
    mypy = [python, "-m", "mypy", "--config-file", config, "--cache-dir", str(SCRATCH / "mypy_cache")]
    scripts = [*mypy, *map(str, SCRIPTS)]
    above = _path(PARTS, os.environ.get("PYTHONPATH"))
    imports = [python, "-c", IMPORTS, "--no-logo", "--cache-dir", str(SCRATCH / "imports_cache")]
    checks: list[tuple[str, list[str], Path, dict[str, str]]] = [
        ("ruff", [python, "-m", "ruff", "check", "."], ROOT, {}),
        ("ruff format", [python, "-m", "ruff", "format", "--check", "."], ROOT, {}),
        ("mypy, packages", [*mypy, *packages], ALIAS, {"MYPYPATH": _path(ALIAS, ROOT / "tests")}),
        ("mypy, scripts", scripts, ROOT / "scripts", {"MYPYPATH": _path(ROOT / "scripts", ROOT / "tests")}),
        ("import-linter", imports, ROOT, {"PYTHONPATH": above, "PYTHONIOENCODING": "utf-8"}),
    ]
    failed = []
    for name, command, folder, settings in checks:
        print(f"--- {name}", flush=True)
        env = {**os.environ, **settings}
        if subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL).returncode:
            failed.append(name)
    if failed:
        print(f"Failed: {', '.join(failed)}.")
    return 1 if failed else 0


def _path(*folders: Path | str | None) -> str:
    """Join folders for an environment variable; unset ones are skipped."""
    return os.pathsep.join(str(folder) for folder in folders if folder)


if __name__ == "__main__":
    sys.exit(main())
