"""A cancel at a chosen moment, so that how late it is noticed can be counted instead of timed."""

from __future__ import annotations

from typing import Any

import comfy.model_management

from .predictions import pack_module


class ProbeCancel:
    """From now on, ComfyUI's cancel is pressed once the `at`-th thing of a kind is done, and all of them are counted.

    Kinds: "photo" (read), "bar" (a node's progress bar moves), and the trainer's events by their names. An empty kind
    ends it. The answer is how many there were since the last time this node ran.
    """

    kind, at, count = "", 0, 0
    replaced: list[tuple[Any, str, Any]] = []

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"kind": ("STRING", {"default": ""}), "at": ("INT", {"default": 1})}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return float("nan")

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, kind: str, at: int) -> dict[str, Any]:
        cls = type(self)
        report = {"count": cls.count}
        while cls.replaced:
            owner, name, own = cls.replaced.pop()
            setattr(owner, name, own)
        cls.kind, cls.at, cls.count = kind, at, 0
        if kind == "photo":
            cls._watch(pack_module("trainer.subject.photo_files"), "read_photo", lambda *_: True)
        elif kind == "bar":
            cls._watch(pack_module("nodes.host").Progress, "update", lambda *_: True)
        elif kind:
            cls._watch(pack_module("nodes.live").Feed, "publish", lambda _, event: type(event).__name__ == kind)
        return {"ui": {"report": [report]}}

    @classmethod
    def _watch(cls, owner: Any, name: str, counts: Any) -> None:
        own = getattr(owner, name)

        def call(*args: Any) -> Any:
            result = own(*args)
            if counts(*args):
                cls.count += 1
                if cls.count == cls.at:
                    comfy.model_management.interrupt_current_processing()
            return result

        cls.replaced.append((owner, name, own))
        setattr(owner, name, call)


NODES = {"ProbeCancel": ProbeCancel}
