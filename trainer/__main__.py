"""The same trainer from a shell: ``python -m trainer --base model.safetensors --photos folder --class-word dog``.

``python -m trainer clean`` shows which old runs and class images could go from the disk.

Also runs under ``accelerate launch --num_processes 1 -m trainer ...``. Ctrl+C, SIGTERM (``kill``, ``timeout``, a job
scheduler), SIGHUP (a closed terminal) and Ctrl+Break keep the steps so far.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Sequence

from .shell import clean, train

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"clean": clean.main}
"""By the first word; without one of them it is a training."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Into a file or a pipe Windows writes in the system's code page, which has not every letter of a path.
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = COMMANDS.get(given[0]) if given else None
    return train.main(given) if command is None else command(given[1:])


if __name__ == "__main__":
    sys.exit(main())
