"""The command line: ``python -m trainer <command> ...``, see :mod:`trainer.shell.commands`.

Without a command, ``python -m trainer --base model.safetensors --photos folder --class-word dog`` trains.

Trains on several GPUs under ``accelerate launch --num_processes N -m trainer ...``. Ctrl+C, SIGTERM (``kill``,
``timeout``, a job scheduler), SIGHUP (a closed terminal) and Ctrl+Break stop the training and save its progress.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Sequence

from .shell.commands import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code.

    Args:
        arguments: without the program's name; None takes ``sys.argv``.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # On Windows, redirected output uses the system's code page, which lacks some characters of paths.
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run(list(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
