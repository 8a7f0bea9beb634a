"""A device with as little memory as a test wants."""

from __future__ import annotations

from typing import Any

import comfy.model_management

_own = comfy.model_management.get_free_memory


class ProbeFreeMemory:
    """From now on ComfyUI says that so many bytes are free, whatever is; 0 lets it count again."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"free": ("INT", {"default": 0, "max": 2**62})}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return float("nan")

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, free: int) -> dict[str, Any]:
        def said(dev: Any = None, torch_free_too: bool = False) -> Any:
            return (free, free) if torch_free_too else free

        comfy.model_management.get_free_memory = said if free else _own
        return {"ui": {"report": [{"free": free}]}}


NODES = {"ProbeFreeMemory": ProbeFreeMemory}
