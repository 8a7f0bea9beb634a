"""The command line: ``python -m trainer --base model.safetensors --photos folder --class-word dog``.

``python -m trainer evaluate`` measures what a LoRA does to its base, and ``python -m trainer clean`` lists old runs and
class images that can be removed from disk.

Also runs under ``accelerate launch --num_processes 1 -m trainer ...``. Ctrl+C, SIGTERM (``kill``, ``timeout``, a job
scheduler), SIGHUP (a closed terminal) and Ctrl+Break stop the training and save its progress.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Sequence

from .shell import clean, evaluate, train

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"clean": clean.main, "evaluate": evaluate.main}
"""Commands by the first argument; any other argument starts a training."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code.

    Args:
        arguments: without the program's name; None takes ``sys.argv``.
    """
    args = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # On Windows, redirected output uses the system's code page, which lacks some characters of paths.
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = COMMANDS.get(args[0]) if args else None
    return train.main(args) if command is None else command(args[1:])


if __name__ == "__main__":
    sys.exit(main())
