"""docs/reliability.md: what holds, and the figures that the last soak has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = """# Reliability: what was tried, and what was seen

Written by `make soak`; every figure below is of its last run, on {date} ({machine}, random seed {seed}).
It was run on a small model of Stable Diffusion 1.5's layout at 64 pixels, because what it is about (files, locks,
random states) does not depend on the size; nothing here says anything about speed.

## Killed at random moments

Each training below was ended with `kill -9` at random moments and started again until it was done, with a checkpoint
after every {seconds} seconds of work (the default is 60). Then its LoRA, its class images and the loss of every step
were compared with those of the same training that was never killed.

| Training | Kills survived | starting | making class images | training | Most steps lost by one kill | End |
|---|---|---|---|---|---|---|
{rows}

A kill costs the steps since the last checkpoint and the step it falls into, and of the class images the batch it
falls into.

## Strange inputs

{inputs}

After each the server answered `/queue`, no message held a traceback, and nothing was written outside the folders that
the pack may write to.

## Traces

{traces}

## What is tested besides

Each change is tested with a short form of all this, and with: cancel, an error and an overflowing loss in the middle
of a run; two programs on one folder; a full disk and a folder that cannot be written; a lock left by a killed program;
damaged checkpoints, class images, adapters and logs; names with spaces, Cyrillic and emoji.
"""


def write_page(path: Path, found: dict[str, Any]) -> Path:
    """Write the page from what scripts/soak.py has found."""
    from soak_shell import CHECKPOINT_SECONDS

    rows = []
    for plan in [*found["plans"], *([found["comfyui"]] if "comfyui" in found else [])]:
        cells = [plan["name"], plan["kills"], plan["starting"], plan["class images"], plan["training"],
                 f"{plan['lost steps']} ({plan['lost seconds']:.1f} s of work)",
                 "bit-identical" if plan["identical"] else "DIFFERENT"]
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    inputs = found.get("inputs") or []
    lines = [f"* {entry['name']}: {entry['cases']} cases" + (f" ({_outcomes(entry['outcomes'])})" if entry.get(
        "outcomes") else "") for entry in inputs]
    total = sum(int(entry["cases"]) for entry in inputs)
    tried = "\n".join([f"{total:,} cases:", "", *lines]) if lines else "None were tried in the last run."
    traces = "\n".join(f"* {entry['name']}: {entry['said']}" for entry in found.get("traces") or [])
    path.write_text(PAGE.format(
        date=found["date"], machine=found["machine"], seed=found["seed"], seconds=f"{CHECKPOINT_SECONDS:g}",
        rows="\n".join(rows), inputs=tried, traces=traces or "None were looked for in the last run."), "utf-8")
    return path


def _outcomes(outcomes: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in outcomes.items())
