"""Remove everything that the other scripts have created: .venv, .cache, demo_output and the tools' caches.

python scripts/clean.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENERATED = (
    ".venv",
    ".cache",
    "demo_output",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "tests/.pytest_cache",
)

if __name__ == "__main__":
    for name in GENERATED:
        # rmtree removes links in .cache (ComfyUI's custom_nodes links to the pack) without following them.
        if (ROOT / name).exists():
            shutil.rmtree(ROOT / name)
            print(f"removed {name}")
