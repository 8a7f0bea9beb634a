"""Check everything that needs a GPU, and print one table. Takes a few minutes.

    python scripts/check_gpu.py [--minutes 8] [--only WORD ...] [--cpu]

Runs in any environment that has torch with GPU support and the packages of requirements.txt; xformers and bitsandbytes
are checked if they are installed, ComfyUI (0.33 or newer) if COMFYUI_PATH is set. Exit code: 0 if nothing failed, 1 if
something failed, 2 without a GPU. `--cpu` runs the same checks with a small model on the CPU, to test the checks.

The project's machines have no GPU, so this has not been run on one yet. tests/card/test_gpu.py runs the same checks.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OK, FAILED, UNAVAILABLE, NOT_RUN = "ok", "FAILED", "unavailable", "not run"
FAILURE, NO_GPU = 1, 2


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    result: str
    figure: str
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="start no check after this time (default 8)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="checks whose names contain one of these")
    parser.add_argument("--cpu", action="store_true", help="a small model on the CPU")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    bench_of, comfy = _package("bench"), _package("comfy_checks")
    chosen: dict[str, Callable[[Any], str]] = {
        name: check
        for name, check in comfy.ALL.items()
        if not options.only or any(word in name for word in options.only)
    }
    if not (options.cpu or torch.cuda.is_available()):
        print(
            "This needs an NVIDIA GPU and a torch build that supports it (torch.cuda.is_available() is false). Checks: "
            f"{', '.join(chosen)}. `--cpu` runs those that a CPU can, with a small model."
        )
        return NO_GPU
    device = torch.device("cpu") if options.cpu else torch.device("cuda", torch.cuda.current_device())
    where = os.environ.get("COMFYUI_PATH")
    bench = bench_of.Bench(device, small=options.cpu, comfyui=Path(where) if where else None)
    print(f"{_machine(device)}; torch {torch.__version__}, Python {platform.python_version()}", flush=True)
    rows = run(chosen, bench, bench_of.NotHere, 60 * options.minutes)
    print(f"\n{table(rows)}")
    return FAILURE if any(row.result == FAILED for row in rows) else 0


def run(
    checks: dict[str, Callable[[Any], str]],
    bench: Any,
    not_here: type[Exception],
    seconds: float,
    show: Callable[[str], None] = lambda line: print(line, flush=True),
) -> list[Row]:
    """Run each check independently: a failure does not stop the others.

    Args:
        bench: passed to each check.
        not_here: the exception that a check raises if something it needs is missing.
        seconds: start no check after this time.
        show: called with each line of the table as soon as it is known.
    """
    rows: list[Row] = []
    began = time.monotonic()
    lost = ""
    for name, check in checks.items():
        started = time.monotonic()
        if lost or started - began >= seconds:
            row = Row(name, NOT_RUN, lost or "time", 0.0)
        else:
            try:
                result, figure = OK, check(bench)
            except not_here as missing:
                result, figure = UNAVAILABLE, str(missing)
            except Exception as error:
                result, figure = FAILED, f"{type(error).__name__}: {error}".splitlines()[0][:300]
                lost = _lost(bench)
            row = Row(name, result, figure, time.monotonic() - started)
        rows.append(row)
        show(f"{row.result:11}  {row.name}: {row.figure} ({row.seconds:.0f} s)")
    return rows


def _lost(bench: Any) -> str:
    """Why this process can no longer use the GPU (some CUDA errors are fatal); empty if it can."""
    import torch

    try:
        torch.zeros(1, device=bench.device).item()
    except Exception as error:
        return f"the GPU no longer responds: {str(error).splitlines()[0][:100]}"
    return ""


def table(rows: Sequence[Row]) -> str:
    """The table with the name, result, seconds and figure of all checks."""
    width = max((len(row.name) for row in rows), default=4)
    lines = [f"{'check':{width}}  {'result':11}  {'s':>5}  figure"]
    lines += [f"{row.name:{width}}  {row.result:11}  {row.seconds:5.0f}  {row.figure}" for row in rows]
    counts = {result: sum(row.result == result for row in rows) for result in (OK, FAILED, UNAVAILABLE, NOT_RUN)}
    return "\n".join([*lines, ", ".join(f"{count} {result}" for result, count in counts.items())])


def _machine(device: Any) -> str:
    import torch

    if device.type == "cpu":
        return "a CPU, with a small model"
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {found.total_memory / 1e9:.1f} GB, compute capability {found.major}.{found.minor}"


def _package(name: str) -> Any:
    """Import a module of tests/card; it needs the pack under the name `subjectbooth`, as in the tests."""
    package = types.ModuleType("subjectbooth")
    package.__path__ = [str(ROOT)]
    sys.modules.setdefault("subjectbooth", package)
    return importlib.import_module(f"subjectbooth.tests.card.{name}")


if __name__ == "__main__":
    sys.exit(main())
