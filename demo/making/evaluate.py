"""Evaluate the demo base: `python -m demo.making.evaluate [part ...]`.

Parts: judge, autoencoder, ceilings, details, seeds, text_to_image, diversity, wide, comfyui, dreambooth (the last two
start a real ComfyUI).
The results are printed and saved by part in demo/making/figures.json, the source for docs/demo-base.md and
docs/demo-base-log.md. Images of the DreamBooth runs go to docs/demo-base-dreambooth.jpg and docs/demo-base-steps.jpg.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .build import WORK
from .files import atomic_path
from .gain import measure_ceilings, measure_details
from .judge import LoadedJudge
from .measure import (
    Figures,
    measure_autoencoder,
    measure_diversity,
    measure_judge,
    measure_text_to_image,
    measure_wide,
)
from .measure_comfyui import measure_comfyui
from .measure_dreambooth import SHEETS, measure_dreambooth, requested_subjects
from .narrow import load_narrow
from .narrow_dreambooth import measure_seeds
from .strips import stack_strips

FIGURES = Path(__file__).parent / "figures.json"
DOCS = Path(__file__).resolve().parents[2] / "docs"

GOALS: dict[tuple[str, str], tuple[str, float]] = {
    ("judge", "class"): (">=", 0.97),
    ("judge", "background"): (">=", 0.99),
    ("autoencoder", "psnr"): (">=", 24.0),
    ("text_to_image", "class"): (">=", 0.90),
    ("text_to_image", "background"): (">=", 0.95),
    ("diversity", "two_styles_or_more"): (">=", 0.80),
    ("wide", "largest_difference"): ("<=", 1e-4),
    ("comfyui", "class"): (">=", 0.90),
    ("comfyui", "background"): (">=", 0.95),
    ("dreambooth", "gain_worst"): (">=", 0.90),
    ("dreambooth", "gain_in_new_scenes_worst"): (">=", 0.75),
    ("dreambooth", "background_in_new_scenes_worst"): (">=", 0.85),
    ("dreambooth", "class_prompt_is_the_subject_worst"): ("<=", 0.10),
}


def verdict_on(part: str, name: str, value: Any) -> str:
    """Whether a figure meets its goal, as text; empty if it has no goal."""
    goal = GOALS.get((part, name))
    if goal is None or not isinstance(value, (int, float)):
        return ""
    sign, limit = goal
    holds = value >= limit if sign == ">=" else value <= limit
    return f"   goal {sign} {limit:g}: {'met' if holds else 'NOT MET'}"


def main() -> None:
    """Evaluate the requested parts (default: all)."""
    nets, judge = load_narrow(), LoadedJudge()
    kept: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}

    def keep(part: str, figures: Figures) -> None:
        kept[part] = figures
        with atomic_path(FIGURES) as temporary:
            temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    def dreambooth() -> Figures:
        strips = WORK / "dreambooth"
        figures = measure_dreambooth(judge, kept.get("dreambooth", {}), partial(keep, "dreambooth"), strips)
        for file, runs in SHEETS.items():
            if sheet := stack_strips(strips, runs):
                sheet.save(DOCS / file, quality=88)
        return figures

    parts: dict[str, Callable[[], Figures]] = {
        "judge": lambda: measure_judge(judge, WORK),
        "autoencoder": lambda: measure_autoencoder(nets, WORK),
        "ceilings": lambda: measure_ceilings(nets, judge),
        "details": lambda: measure_details(nets, judge),
        "seeds": lambda: measure_seeds(requested_subjects()),
        "text_to_image": lambda: measure_text_to_image(nets, judge),
        "diversity": lambda: measure_diversity(nets, judge),
        "wide": lambda: measure_wide(nets),
        "comfyui": lambda: measure_comfyui(judge),
        "dreambooth": dreambooth,
    }
    parser = argparse.ArgumentParser(prog="python -m demo.making.evaluate", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help="parts to evaluate; default: all")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))} (choose from {', '.join(parts)})")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for part in arguments.parts or parts:
        figures = parts[part]()
        keep(part, figures)
        print(part)
        for name, value in figures.items():
            shown = f"{value:.5g}" if isinstance(value, float) else value
            print(f"  {name}: {shown}{verdict_on(part, name, value)}")


if __name__ == "__main__":
    main()
