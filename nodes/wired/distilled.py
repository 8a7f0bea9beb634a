"""Recognises distilled models, which draw in few steps or without guidance, and lose some of that by training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .families import WiredFamily

_DISTILLED = re.compile(
    r"turbo|lightning|schnell|distill|lightx2v|causvid"
    r"|(?<![a-z])(lcm|tcd|pcm|dmd\d?|flash|hyper[-_ ]?(sd|flux)\w*|\d+[-_ ]?steps?)(?![a-z])",
    re.IGNORECASE,
)
"""In the names of models, and of LoRAs on them, that draw in few steps or without guidance."""

_NOT_DISTILLED = re.compile(r"(de|un|non|not)[-_ ]?(turbo|distill)\w*", re.IGNORECASE)
"""Names that say that the distillation was undone."""

_ADAPTER = re.compile(r"training[-_ ]?adapter", re.IGNORECASE)
"""A LoRA that undoes the distillation for the time of training, as ai-toolkit's does."""


def distilled_note(family: WiredFamily, settings: Mapping[str, Any], files: Iterable[str]) -> str:
    """A sentence about a base that appears to be distilled, and what to train on instead; empty for any other base.

    Args:
        family: of the model.
        settings: of the model, as ComfyUI has found them in its file.
        files: names of the files that the model is made from, LoRAs included. Most distilled models have weights of the
            same names and shapes as the other, and nothing else tells.
    """
    names = [name.replace("\\", "/").rsplit("/", 1)[-1] for name in files]
    if any(_ADAPTER.search(name) for name in names):
        return ""
    named = next((name for name in names if _is_distilled(name, family)), "")
    setting, value = family.distilled_setting or ("", None)
    if not named and (not setting or settings.get(setting) != value):
        return ""
    return (
        f"{named or family.name} appears to be distilled, and training undoes some of that: images in few steps get "
        f"worse. Train on {family.undistilled or family.name} instead, the model that is not distilled; its LoRA works "
        "on both"
    )


def _is_distilled(name: str, family: WiredFamily) -> bool:
    own = bool(family.distilled) and re.search(family.distilled, name, re.IGNORECASE) is not None
    return own or _DISTILLED.search(_NOT_DISTILLED.sub("", name)) is not None
