"""Test-only nodes that report what goes on inside ComfyUI's process. Never shipped.

Each is an output node whose `ui` answer is {"report": [{...}]}, which the history hands to the test as JSON. Heavy or
special probes live in modules beside this one and are added to NODE_CLASS_MAPPINGS here.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import logging
import os
import random
import signal
import sys
import threading
from typing import Any

import comfy.model_management
import numpy
import psutil
import torch

from . import (
    cancel_probes,
    digests,
    gguf_probes,
    live_probes,
    memory_probes,
    predictions,
    step_cost,
    vision_probes,
    wired_gradients,
    wired_probes,
)
from .subject_probes import ProbePriors, ProbeSubject


class AnyType(str):
    """A socket type that connects to every other: ComfyUI compares types with `!=`."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


ANY = AnyType("*")


def live_parameters() -> dict[str, int]:
    """Count of all torch parameters that are alive, and of those that want gradients."""
    gc.collect()
    seen: set[int] = set()
    total = trainable = 0
    for thing in gc.get_objects():
        try:
            if not isinstance(thing, torch.nn.Parameter) or id(thing) in seen:
                continue
        except ReferenceError:  # a weak proxy whose object is gone
            continue
        seen.add(id(thing))
        total += thing.numel()
        trainable += thing.numel() if thing.requires_grad else 0
    return {"parameters": total, "trainable_parameters": trainable}


def give_back_freed_memory() -> None:
    """glibc keeps freed blocks for later; what is counted is what is still in use."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def process_state() -> dict[str, Any]:
    """What a node could leave behind in the process besides memory: threads, handles, and everybody's settings."""
    process = psutil.Process()
    settings = {
        "grad mode": torch.is_grad_enabled(),
        "default dtype": str(torch.get_default_dtype()),
        "tf32": [
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
        ],
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark],
        "threads of torch": torch.get_num_threads(),
        "environment": hashlib.sha256(repr(sorted(os.environ.items())).encode()).hexdigest(),
        "working directory": os.getcwd(),  # noqa: PTH109
        "path": list(sys.path),
        "log level": logging.getLogger().level,
        "log handlers": [type(handler).__name__ for handler in logging.getLogger().handlers],
        "exception hook": repr(sys.excepthook),
        "signals": [repr(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
    }
    random_states = {
        "torch": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "numpy": hashlib.sha256(numpy.random.get_state()[1].tobytes()).hexdigest(),  # type: ignore[index,union-attr]
        "python": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
    }
    return {
        "settings": settings,
        "random_states": random_states,
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "handles": process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
        "open_files": sorted(file.path for file in process.open_files()),
        "tensors": live_tensors(),
    }


def live_tensors() -> int:
    """How many torch tensors are alive."""
    gc.collect()
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


class ProbeState:
    """Models ComfyUI holds, live parameters, memory of the process, which heavy libraries are imported.

    `after` takes anything: it makes the probe run after the node it comes from. `nonce` forces a new look.
    """

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}, "optional": {"after": (ANY,), "nonce": ("INT", {"default": 0, "max": 2**31})}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return float("nan")

    def probe(self, after: Any = None, nonce: int = 0) -> dict[str, Any]:
        loaded = comfy.model_management.current_loaded_models
        heavy = ("diffusers", "peft", "transformers", "accelerate")
        parameters = live_parameters()
        give_back_freed_memory()
        report = {
            "loaded_models": len(loaded),
            "loaded_model_types": [type(m.model.model).__name__ for m in loaded if m.model is not None],
            **parameters,
            **process_state(),
            "rss_mb": psutil.Process().memory_info().rss / 2**20,
            "inference_mode": torch.is_inference_mode_enabled(),
            "imported": [name for name in heavy if name in sys.modules],
        }
        return {"ui": {"report": [report]}}


class ProbeImage:
    """Exact numbers of an IMAGE, LATENT or MASK: shape, mean, std, extremes and a hash of the bytes."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": (ANY,)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, value: Any) -> dict[str, Any]:
        import hashlib

        tensor = value["samples"] if isinstance(value, dict) else value
        tensor = tensor.detach().cpu().contiguous()
        report = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype),
            "finite": bool(torch.isfinite(tensor).all()),
            "mean": tensor.float().mean().item(),
            "std": tensor.float().std().item(),
            "min": tensor.min().item(),
            "max": tensor.max().item(),
            "sha256": hashlib.sha256(tensor.numpy().tobytes()).hexdigest(),
        }
        return {"ui": {"report": [report]}}


class ProbeValue:
    """What a STRING, INT, FLOAT or any JSON-able value is; other things as their type's name."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": (ANY,)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, value: Any) -> dict[str, Any]:
        plain = isinstance(value, str | int | float | bool | list | dict | None)
        return {"ui": {"report": [{"type": type(value).__name__, "value": value if plain else None}]}}


class ProbeFail:
    """Raises, so that the harness can show how it reports a failing node."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"message": ("STRING", {"default": ""})}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, message: str) -> dict[str, Any]:
        raise ValueError(message)


NODE_CLASS_MAPPINGS = {
    "ProbeState": ProbeState,
    "ProbeImage": ProbeImage,
    "ProbeValue": ProbeValue,
    "ProbeFail": ProbeFail,
    "ProbeSubject": ProbeSubject,
    "ProbePriors": ProbePriors,
    **predictions.NODES,
    **digests.NODES,
    **live_probes.NODES,
    **memory_probes.NODES,
    **cancel_probes.NODES,
    **vision_probes.NODES,
    **wired_probes.NODES,
    **wired_gradients.NODES,
    **step_cost.NODES,
    **gguf_probes.NODES,
}
