"""Checkpoints of earlier versions, brought into today's form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from .adapter import adapter_parameters
from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import nn

_TEXT_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


def without_unused_layers(resume: Checkpoint, modules: Mapping[str, nn.Module]) -> Checkpoint:
    """Drop the LoRA of text encoder layers after the one the prompt is taken from, which today get none.

    Such a LoRA never had a gradient, so it has no optimizer state, but it took part in the numbering of parameters.

    Args:
        modules: the network and text encoders with their LoRA injected, in the order of the optimizer's parameters.
    """
    is_kept: list[bool] = []  # for each parameter of the checkpoint, in the optimizer's order
    dropped: set[str] = set()
    for prefix, module in modules.items():
        own = {f"{prefix}/{name}" for name in adapter_parameters(module)}
        last = max(map(_text_layer, own), default=-1)
        unused = {
            name
            for name in resume.adapter
            if name.startswith(f"{prefix}/") and name not in own and _text_layer(name) > last >= 0
        }
        dropped |= unused
        is_kept += [True] * len(own) + [False] * len(unused)  # unused layers come after the used ones
    if not dropped:
        return resume
    kept = [number for number, keep in enumerate(is_kept) if keep]
    new_number = {old: new for new, old in enumerate(kept)}
    return replace(
        resume,
        adapter={name: tensor for name, tensor in resume.adapter.items() if name not in dropped},
        optimizer={new_number[old]: state for old, state in resume.optimizer.items() if old in new_number},
        average=[resume.average[old] for old in kept] if resume.average else [],
    )


def _text_layer(name: str) -> int:
    """``"lora_te/text_model.encoder.layers.3.mlp.fc1.lora_A.weight"`` -> 3; -1 for other modules."""
    found = _TEXT_LAYER.search(name)
    return int(found.group(1)) if found else -1
