"""Remove everything that the other scripts have made: .venv, .cache, demo_output and the tools' caches.

python scripts/clean.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = (
    ".venv",
    ".cache",
    "demo_output",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "tests/.pytest_cache",
)

if __name__ == "__main__":
    for name in MADE:
        # Links in .cache (the pack inside its own ComfyUI folder) are removed as links, never followed.
        if (ROOT / name).exists():
            shutil.rmtree(ROOT / name)
            print(f"removed {name}")
