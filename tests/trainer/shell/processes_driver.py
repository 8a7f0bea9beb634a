"""One training by one process and by several: one process loads everything and forks them, as a launcher starts them.

python processes_driver.py FOLDER, with single.safetensors and photos in it; prints one JSON line: for each case of
`CASES` the exit codes and the messages of the processes, and how often they added up tensors in all. A process that
has not ended after two minutes is killed by SIGALRM.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
package = types.ModuleType("subjectbooth")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("subjectbooth", package)

import torch  # noqa: E402
import torch.distributed  # noqa: E402

from subjectbooth.tests.layout_pair import NARROW  # noqa: E402
from subjectbooth.tests.trainer.runs.kill_driver import load_libraries  # noqa: E402
from subjectbooth.trainer import __main__ as shell  # noqa: E402
from subjectbooth.trainer.base.sd import families  # noqa: E402
from subjectbooth.trainer.learn import gradients, loop  # noqa: E402
from subjectbooth.trainer.learn.loss import Losses  # noqa: E402
from subjectbooth.trainer.shell import recipe  # noqa: E402

STEPS = 4
LONGEST = 120
"""Seconds. Processes wait an hour for one that is silent: one that was killed has to be noticed much earlier."""


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def not_finite() -> None:
    """The loss of the process's images, from now on."""
    whole = gradients.batch_losses

    def nan(*given: Any) -> Losses:
        losses = whole(*given)
        return Losses(losses.total * float("nan"), losses.terms, losses.each * float("nan"))

    gradients.batch_losses = nan


def out_of_memory() -> None:
    raise MemoryError("out of memory")


Failure = Callable[[], None]
COMPUTE, LEARN = (gradients.Gradients, "_compute"), (loop.Training, "_learn")
Failures = dict[tuple[Any, str], tuple[int, Failure]]
CASES: list[tuple[str, str, int, Failures]] = [
    # name, output, processes, and what happens to the last of them, in which call of what
    ("one", "one", 1, {}),
    ("two", "two", 2, {}),
    ("killed", "changing", 2, {COMPUTE: (1, out_of_memory), LEARN: (2, killed)}),
    ("terminated", "changing", 2, {LEARN: (1, interrupted)}),
    ("not finite", "changing", 2, {COMPUTE: (1, not_finite)}),
    ("one again", "changing", 1, {}),
]
BATCH = 2


def main(folder: Path) -> None:
    families.FAMILIES = tuple(NARROW.values())
    load_libraries()
    recipe.generate = functools.partial(recipe.generate, steps=3)
    torch.set_num_threads(1)  # a fork has none of the others
    found = {}
    for name, output, count, failures in CASES:
        log = folder / output / "log"
        (folder / output).mkdir(exist_ok=True)
        log.write_text("")
        codes = run(folder, name, folder / output, log, count, failures)
        sums = [int(path.read_text()) for path in folder.glob(f"{name}_*.sums")]
        found[name] = {"codes": codes, "log": log.read_text("utf-8"), "sums": sums}
    print(json.dumps(found))


def run(folder: Path, name: str, output: Path, log: Path, count: int, failures: Failures) -> list[int]:
    """The exit codes of the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        signal.alarm(LONGEST)
        try:
            file = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            if count > 1:
                launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                loopback = "lo0" if sys.platform == "darwin" else "lo"
                place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": loopback}
                os.environ |= {name: str(value) for name, value in {**launcher, **place}.items()}
            if rank == count - 1:
                for (owner, method), (call, failure) in failures.items():
                    inject(owner, method, call, failure)
            sums = count_sums()
            code = shell.main(arguments(folder, output, BATCH // count))
            (folder / f"{name}_{rank}.sums").write_text(str(len(sums)))
        finally:
            sys.stdout.flush()
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def count_sums() -> list[int]:
    """Has the size of each tensor that this process adds up with others."""
    sums: list[int] = []
    whole = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *given: Any, **named: Any) -> Any:
        sums.append(tensor.numel())
        return whole(tensor, *given, **named)

    torch.distributed.all_reduce = counted
    return sums


def inject(owner: Any, name: str, call: int, failure: Failure) -> None:
    """Let a call of a method fail, counted from 1."""
    whole, calls = getattr(owner, name), 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            failure()
        return whole(*given, **named)

    setattr(owner, name, counted)


def arguments(folder: Path, output: Path, batch: int) -> list[str]:
    options: dict[str, Any] = {
        "base": folder / "single.safetensors",
        "photos": folder / "photos",
        "class_word": "cat",
        "token": "hta",
        "output_dir": output,
        "steps": STEPS,
        "train_batch_size": batch,
        "gradient_accumulation_steps": 2,
        "resolution": 64,
        "preservation": "class_images",
        "num_class_images": 3,
        "pictures_per_forward": 2,
        "checkpoint_seconds": 0,
        "validation_interval": 0 if output.name == "changing" else 3,
        "validation_steps": 2,
        "learning_rate": 1e-3,
        "rank": 4,
        "clip_skip": 2,
    }
    named = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [*named, "--cpu", "--train_text_encoder"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
