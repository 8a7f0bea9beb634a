"""``python -m trainer inspect``: what is in a LoRA file, and how it was made."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..errors import SubjectBoothError
from ..files.storage import user_path
from ..runs.lora_reader import read_lora, trigger_words
from .terms import error_in_shell

_SUFFIXES = {
    "lora_down.weight": "layers",
    "lora_up.weight": "",
    "alpha": "",
    "dora_scale": "layers with DoRA",
    "diff": "whole weights",
    "diff_b": "biases",
}
"""The end of a tensor's name, and what it is counted as."""


def main(arguments: Sequence[str]) -> int:
    """Print the summary; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer inspect",
        description="Shows the trigger words, layers and ranks of a LoRA file, and the settings stored in it.",
    )
    parser.add_argument("lora", type=user_path, help="LoRA file (.safetensors).")
    options = parser.parse_args(arguments)
    try:
        print(summary(options.lora))
    except SubjectBoothError as error:
        print(error_in_shell(error), file=sys.stderr)
        return 2
    return 0


def summary(path: Path) -> str:
    """Trigger words, layers, ranks, size and metadata of a LoRA file, as lines.

    Raises:
        SubjectBoothError: the file cannot be read, or is damaged.
    """
    tensors, metadata = read_lora(path)
    words = trigger_words(metadata)
    lines = [
        f"{path.name}: {path.stat().st_size / 1e6:.1f} MB",
        f"write {words!r} in prompts" if words else "the file does not say which words to write in prompts",
        *_counted(tensors),
    ]
    if metadata:
        lines.append("stored with it:")
        # Control characters of a third party's file must not reach the terminal.
        lines += [f"  {name} = {_printable(metadata[name])}" for name in sorted(metadata)]
    return "\n".join(lines)


def _counted(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    parts = {"lora_te": "text encoder"}
    counts: Counter[tuple[str, str]] = Counter()
    ranks: dict[str, set[int]] = {}
    for name, tensor in tensors.items():
        layer, _, suffix = name.partition(".")
        where = next((part for prefix, part in parts.items() if layer.startswith(prefix)), "denoiser")
        kind = _SUFFIXES.get(suffix, "other tensors")
        if kind:
            counts[where, kind] += 1
        if suffix == "lora_down.weight":
            ranks.setdefault(where, set()).add(tensor.shape[0])
    lines = []
    for where in ("denoiser", "text encoder"):
        found = [f"{count} {kind}" for (place, kind), count in counts.items() if place == where]
        rank = f", rank {', '.join(map(str, sorted(ranks[where])))}" if where in ranks else ""
        if found:
            lines.append(f"{where}: {', '.join(found)}{rank}")
    return lines


def _printable(text: str) -> str:
    shown = text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"
    return shown if shown.isprintable() else ascii(shown)
