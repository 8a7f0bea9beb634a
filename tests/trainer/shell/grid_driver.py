"""A grid that is killed with SIGKILL ten times and started again: one process loads everything and forks.

python grid_driver.py FOLDER EXPERIMENT BASE; prints one JSON line: for the whole grid and for the killed one, the
files of the page and how often each step was trained.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
package = types.ModuleType("subjectbooth")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("subjectbooth", package)

import torch  # noqa: E402

from subjectbooth.tests.layout_pair import NARROW  # noqa: E402
from subjectbooth.tests.trainer.runs.kill_driver import load_libraries  # noqa: E402
from subjectbooth.trainer import __main__ as shell  # noqa: E402
from subjectbooth.trainer.base.sd import families  # noqa: E402
from subjectbooth.trainer.experiment import page  # noqa: E402
from subjectbooth.trainer.experiment.records import Records  # noqa: E402
from subjectbooth.trainer.learn import loop, viewer  # noqa: E402

MOMENTS: dict[str, tuple[Any, str, int]] = {
    "before the second step of the first run": (loop.Training, "_learn", 2),
    "between the last step and its scores": (viewer.Viewer, "score", 3),
    "before a record is written": (Records, "write", 1),
    "in the middle of the second run": (loop.Training, "_learn", 2),
    "while the page is written": (page, "_sheet_file", 2),
}
"""What is killed when it is called for the n-th time in a program, in this order."""
RANDOM = [(os, "replace", random.Random(seed).randint(1, 3)) for seed in range(5)]
"""Then before a random one of the next files is put in its place; something is left to do after all of these."""


def main(folder: Path, experiment: str) -> None:
    families.FAMILIES = tuple(NARROW.values())
    load_libraries()
    import transformers

    _ = transformers.CLIPModel
    torch.set_num_threads(1)  # a fork has none of the others
    found = {}
    *chosen, last = MOMENTS.values()
    for name, moments in {"whole": [], "killed": [*chosen, *RANDOM, last]}.items():
        output = folder / name
        codes = [run(output, experiment, moment) for moment in moments] + [run(output, experiment, None)]
        before = trained(output)
        codes.append(run(output, experiment, None))  # finished: nothing to do
        files = {path.name: path.read_bytes().hex() for path in (output / "killed").iterdir() if path.suffix != ".md"}
        files["README.md"] = (output / "killed" / "README.md").read_text("utf-8")
        found[name] = {"codes": codes, "files": files, "trained": before, "again": trained(output) != before}
    print(json.dumps(found))


def trained(output: Path) -> dict[str, int]:
    """How often each step was trained in any program, over all runs."""
    return Counter((output / "trained").read_text("utf-8").splitlines())


def run(output: Path, experiment: str, moment: tuple[Any, str, int] | None) -> int:
    """The exit code of a program; that of a killed one is -9."""
    output.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(output / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
        os.dup2(1, 2)
        note_steps(output / "trained")
        if moment is not None:
            kill_at(*moment)
        os._exit(shell.main(["experiment", experiment, "--output_dir", str(output), "--cpu"]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def note_steps(path: Path) -> None:
    learn = loop.Training._learn

    def noting(self: loop.Training, *arguments: Any) -> Any:
        learned = learn(self, *arguments)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"rank {self._config.rank}, seed {self._config.seed}, step {self.step + 1}\n")
        return learned

    loop.Training._learn = noting  # type: ignore[method-assign]


def kill_at(owner: Any, name: str, call: int) -> None:
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def killing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, killing)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
