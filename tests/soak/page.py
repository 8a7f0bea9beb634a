"""docs/reliability.md: what holds, and the figures that the soak has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from soak.shell import CHECKPOINT_SECONDS

PAGE = """# Reliability: what was tried, and what was seen

Written by the parts of `make soak`: what each measured, on what and when. The raw figures are in `reliability.json`
beside this page. All of it was run on small models of Stable Diffusion 1.5's kind at 64 pixels, because what it is
about (files, locks, random states) does not depend on the size; nothing here says anything about speed.

## Killed at random moments

Each training below was ended with `kill -9` at random moments and started again until it was done. Then its LoRA, its
class images and the loss of every step were compared with those of the same training that was never killed. A kill
costs the steps since the last checkpoint and the step it falls into, and of the class images the batch it falls into.

The trainer's run on a model of a few thousand weights, in forks of one process
(`tests/trainer/runs/kill_driver.py`), with a checkpoint after every step:

{forks}

The whole program from a shell, on the small model, with a checkpoint after every {seconds} seconds of work (the default
is 60):

{kills}

ComfyUI, likewise:

{comfyui}

## Strange inputs

Files, read by the trainer's own functions (each gives its content or one sentence):

{files}

Inputs of the nodes, files and requests in a real ComfyUI:

{inputs}

After each of them the server answered `/queue`; no message held a traceback, and nothing was written outside the
folders that the pack may write to.

## Traces

{traces}

## What is tested besides

Each change is tested with a short form of all this, and with: cancel, an error and an overflowing loss in the middle
of a run; two programs on one folder; a full disk and a folder that cannot be written; a lock left by a killed program;
damaged checkpoints, class images, adapters and logs; names with spaces, Cyrillic and emoji.
"""
NONE = "Not measured yet."


def write_page(path: Path, found: dict[str, dict[str, Any]]) -> Path:
    """Write the page; a part that was not measured now keeps the figures of its last time."""
    raw = path.with_suffix(".json")
    known: dict[str, dict[str, Any]] = json.loads(raw.read_text("utf-8")) if raw.is_file() else {}
    known.update(found)
    raw.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", "utf-8")
    path.write_text(
        PAGE.format(
            seconds=f"{CHECKPOINT_SECONDS:g}",
            forks=_kills(known.get("forks")),
            kills=_kills(known.get("kills")),
            comfyui=_kills(known.get("comfyui")),
            files=_inputs(known.get("files")),
            inputs=_inputs(known.get("inputs")),
            traces=_traces(known.get("traces")),
        ),
        "utf-8",
    )
    return path


def _when(part: dict[str, Any]) -> str:
    return f"Measured on {part['date']} ({part['machine']}, random seed {part['seed']})"


def _kills(part: dict[str, Any] | None) -> str:
    if part is None:
        return NONE
    names = ("Training", "Kills survived", "starting", "making class images", "training", "Most steps lost", "End")
    lines = ["| " + " | ".join(names) + " |", "|---|---|---|---|---|---|---|"]
    for row in part["rows"]:
        cells = [
            row["name"],
            row["kills"],
            row["starting"],
            row["class images"],
            row["training"],
            row["lost steps"],
            "bit-identical" if row["identical"] else "DIFFERENT",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    total = sum(row["kills"] for row in part["rows"])
    return "\n".join([*lines, "", f"{_when(part)}: {total} kills."])


def _inputs(part: dict[str, Any] | None) -> str:
    if part is None:
        return NONE
    total = sum(int(row["cases"]) for row in part["rows"])
    lines = [f"{_when(part)}: {total:,} cases.", ""]
    for row in part["rows"]:
        told = ", ".join(f"{name} {count}" for name, count in (row.get("outcomes") or {}).items())
        lines.append(f"* {row['name']}: {row['cases']}" + (f" ({told})" if told else ""))
    return "\n".join(lines)


def _traces(part: dict[str, Any] | None) -> str:
    if part is None:
        return NONE
    return "\n".join([f"{_when(part)}.", "", *(f"* {row['name']}: {row['said']}" for row in part["rows"])])
