"""The results as a Markdown table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .contestants import Contestant
from .rounds import Measured
from .scene import Scene

NOISY_SPREAD = 1.05
"""The floor's slowest round over its fastest: above this, small differences mean nothing."""

STEP = ("contestant", "wall", "CPU", "GFLOP", "kernels", "host reads", "casts", "peak GB", "copies of the base")
JOB = ("contestant", "whole", "imports", "base", "hashing", "encoding", "class images", "other", "steps", "saving")
MARK = "≈"


def report(scene: Scene, contestants: Sequence[Contestant], measured: Measured) -> tuple[str, str]:
    """The tables for people, and all figures as JSON."""
    rows = {each.name: summary(scene, each, measured) for each in contestants}
    shown = [each for each in contestants if each.name in (*measured.counted, *measured.timed)]
    text = [
        f"{_machine(scene)}; {describe(scene)}.",
        "",
        _table(STEP, [[each.title, *_step_row(rows[each.name])] for each in shown]),
        "",
        "A step: wall and CPU time as ratios to the bare loop with the same images, of the same round (median, and "
        f"lowest to highest of the rounds). {MARK}: rounds on both sides of 1, so no difference to see. "
        "Counted in one step: products, kernels without views, reads by the host, copies to another dtype. Peak memory "
        "of the process in the steps" + (" (on the GPU)" if scene.device == "cuda" else "") + ".",
    ]
    if measured.timed:
        jobs = [[each.title, *_job_row(rows[each.name])] for each in shown if each.name in measured.timed]
        text += ["", _table(JOB, jobs), "", "Seconds from the start of the process to the LoRA file, and its parts."]
    text += ["", *(f"* {each.title}: {each.note}." for each in shown if each.note)]
    text += [f"* FAILED {name}: {message.splitlines()[0]}" for name, message in measured.failed.items()]
    text += ["", *noise(scene, measured)]
    figures = {
        "scene": asdict(scene) | {"folder": str(scene.folder)},
        "machine": _machine(scene),
        "rows": rows,
        "counted": measured.counted,
        "timed": measured.timed,
        "failed": measured.failed,
        "loads": measured.loads,
    }
    return "\n".join(text) + "\n", json.dumps(figures, indent=1)


def read(path: Path, scene: Scene) -> Measured | None:
    """What an earlier run has written there; None without one.

    Raises:
        SystemExit: it measured something else.
    """
    if not path.is_file():
        return None
    figures = json.loads(path.read_text("utf-8"))
    if Scene.from_json(json.dumps(figures["scene"])) != scene:
        raise SystemExit(f"{path} has the results of other settings; choose another --out")
    return Measured(figures["counted"], figures["timed"], {}, figures["loads"])


def step_seconds(scene: Scene, found: dict[str, Any], clock: str) -> float:
    """Seconds of a step of one run: the median on a CPU; on a GPU the mean, as only its ends have waited for it."""
    values = found[clock]
    return statistics.median(values) if scene.device == "cpu" and clock == "wall" else statistics.mean(values)


def summary(scene: Scene, contestant: Contestant, measured: Measured) -> dict[str, Any]:
    """What the table shows of one contestant."""
    mine, floors = measured.timed.get(contestant.name, []), measured.timed.get(contestant.floor, [])
    rounds = list(zip(mine, floors, strict=False))
    found: dict[str, Any] = {"rounds": len(rounds)}
    for clock in ("wall", "cpu"):
        ratios = [step_seconds(scene, own, clock) / step_seconds(scene, floor, clock) for own, floor in rounds]
        found[clock] = ratios
        found[f"{clock}_seconds"] = [step_seconds(scene, own, clock) for own in mine]
    counted = measured.counted.get(contestant.name, {})
    found |= counted.get("counts", {})
    peaks = [run["device_peak" if scene.device == "cuda" else "peak"] for run in mine or [counted] if run]
    found["peak"] = max(peaks, default=0)
    found["copies"] = counted.get("copies")
    if mine:
        found["job"] = {name: statistics.median(_job(run)[name] for run in mine) for name in JOB[1:]}
    return found


def ratio(values: Sequence[float]) -> str:
    """Median and range; marked if there is no difference to see."""
    if not values:
        return "-"
    median, low, high = statistics.median(values), min(values), max(values)
    if len(values) == 1 or low == high == 1:
        return f"{median:.2f}"
    mark = f" {MARK}" if low <= 1 <= high else ""
    return f"{median:.2f} ({low:.2f} to {high:.2f}){mark}"


def noise(scene: Scene, measured: Measured) -> list[str]:
    """Sentences on how far the times can be believed."""
    found = []
    for name in ("floor", "floor-class"):
        seconds = [step_seconds(scene, run, "wall") for run in measured.timed.get(name, [])]
        if len(seconds) < 2:
            continue
        spread = max(seconds) / min(seconds)
        what = "with images of the class" if name.endswith("class") else "alone"
        found.append(f"The bare loop {what}: {statistics.median(seconds):.4f} s per step, spread {spread:.2f}.")
        if spread > NOISY_SPREAD:
            found.append(f"**Noisy: its rounds differ by {spread - 1:.0%}; smaller differences mean nothing.**")
    cores = os.cpu_count() or 1
    if measured.timed and any(load > cores * 1.5 for load in measured.loads):
        found.append(f"**Noisy: the load average was up to {max(measured.loads):.1f} on {cores} cores.**")
    if measured.timed and min(map(len, measured.timed.values())) < 2:
        found.append("**One round only: without a range, no ratio can be told from noise.**")
    return found


def describe(scene: Scene) -> str:
    """The settings in a line."""
    return (
        f"{scene.size} UNet, {scene.resolution} px, rank {scene.rank}, batch {scene.batch}, {scene.precision}, "
        f"{scene.timed} timed steps after {scene.warm_up}"
    )


def _machine(scene: Scene) -> str:
    import torch

    if scene.device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    threads = scene.threads or torch.get_num_threads()
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {threads} threads, torch {torch.__version__}"


def _step_row(row: dict[str, Any]) -> list[str]:
    known = "flop" in row
    return [
        ratio(row["wall"]),
        ratio(row["cpu"]),
        f"{row['flop'] / 1e9:.1f}" if known else "-",
        *(f"{row[name]:,}" if known else "-" for name in ("kernels", "syncs", "casts")),
        f"{row['peak'] / 2**30:.2f}" if row["peak"] else "-",
        "-" if row["copies"] is None else f"{row['copies']:.1f}",
    ]


def _job(run: dict[str, Any]) -> dict[str, float]:
    """The parts of a whole job, in seconds."""
    parts = {name: run["parts"].get(name, 0.0) for name in JOB[3:7]}
    steps, imports = run["last_step"] - run["first_step"], run["imports"] + run["parts"].get("imports", 0.0)
    other = run["first_step"] - imports - sum(parts.values())
    return {
        "whole": run["whole"],
        "imports": imports,
        **parts,
        "other": other,
        "steps": steps,
        "saving": run["whole"] - run["last_step"],
    }


def _job_row(row: dict[str, Any]) -> list[str]:
    return [f"{row['job'][name]:.1f}" if row["job"][name] >= 0.05 else "" for name in JOB[1:]]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
