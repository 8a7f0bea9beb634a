"""Watches a training from inside its process: stamps each optimizer step, and counts one."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from subjectbooth.benchmarks.counting import Dispatched, outliving_inference_mode
from subjectbooth.benchmarks.memory import (
    copies_of,
    device_peak_bytes,
    load_fingerprints,
    peak_bytes,
    restart_peak,
    status_bytes,
    tensor_bytes,
)
from subjectbooth.benchmarks.parts import Parts
from subjectbooth.benchmarks.scene import Scene

COUNTED = 1


class Recorder:
    """Stamps wall and CPU time after each step of any optimizer of this process, by torch's own hook.

    On a GPU only the first and the last stamp of the timed steps wait for it, so that a step that keeps its queue full
    is seen to.

    Args:
        scene: the settings.
        out: the JSON file to write.
        counts: whether a step after the timed ones is counted.
        started: ``time.monotonic()`` when the process was started.

    Attributes:
        parts: of the time before the first step.
    """

    def __init__(self, scene: Scene, out: Path, counts: bool, started: float) -> None:
        self._scene, self._out, self._started = scene, out, started
        self.parts = Parts()
        self._first, self._last = scene.warm_up, scene.warm_up + scene.timed
        self._steps = steps_of(scene, counts)
        self._stamps: list[tuple[float, float]] = []
        self._found: dict[str, Any] = {"started": started}
        self._counter: Dispatched | None = None
        self._counting = ExitStack()
        if counts:
            self._counting.enter_context(outliving_inference_mode())
        self._hook = register_optimizer_step_post_hook(self._after_step)

    def mark(self, name: str) -> None:
        """Note when something happened, in seconds since the process was started."""
        self._found.setdefault(name, time.monotonic() - self._started)

    def start_parts(self) -> None:
        """The program is loaded: what it imports later counts as imports as well."""
        self.mark("imports")
        self.parts.measure_imports()

    def _after_step(self, *_: Any) -> None:
        if self._counter is not None:
            self._end_count()
        step = len(self._stamps) + 1
        if step > self._steps:
            raise RuntimeError(f"more optimizer steps than the {self._steps} that were asked for")
        if step in (self._first, self._last) and self._scene.device == "cuda":
            torch.cuda.synchronize()
        self._stamps.append((time.perf_counter(), time.process_time()))
        if step == 1:
            self.mark("first_step")
            self._found["first_cpu"] = time.process_time()
            self.parts.stop()
        if step == self._first:
            self._found["peak_before"] = peak_bytes()
            self._found["peak_is_of_steps"] = restart_peak()
            # Not part of the first timed step.
            self._stamps[-1] = time.perf_counter(), time.process_time()
        if step == self._last:
            self.mark("last_step")
            self._found["peak"], self._found["device_peak"] = peak_bytes(), device_peak_bytes()
            self._found["own"], self._found["mapped"] = status_bytes("RssAnon"), status_bytes("RssFile")
            self._found["threads"] = torch.get_num_threads()
            if self._steps > step:  # not in a timed run, whose end it would delay
                self._found["tensors"] = tensor_bytes()
                self._found["copies"] = copies_of(load_fingerprints(self._scene.base))
        if step == self._steps - COUNTED and self._steps > self._last:
            self._counter = Dispatched(self._scene.device)
            self._counting.enter_context(self._counter)
        if step == self._steps:
            self.write()

    def _end_count(self) -> None:
        counted, self._counter = self._counter, None
        assert counted is not None
        self._counting.close()
        self._found["counts"] = {
            "flop": counted.flop,
            "kernels": counted.kernels,
            "syncs": sum(counted.syncs.values()),
            "casts": counted.cast_kernels,
            "cast_bytes": counted.casts,
            "sync_places": dict(counted.syncs),
        }

    def close(self) -> None:
        """Watch no more."""
        self._hook.remove()
        self._counting.close()

    def write(self) -> None:
        """Write what was found so far."""
        pairs = list(zip(self._stamps[self._first - 1 :], self._stamps[self._first : self._last], strict=False))
        self._found |= {
            "wall": [after[0] - before[0] for before, after in pairs],
            "cpu": [after[1] - before[1] for before, after in pairs],
            "parts": self.parts.seconds,
        }
        part = self._out.with_suffix(".part")
        part.write_text(json.dumps(self._found), "utf-8")
        os.replace(part, self._out)


def steps_of(scene: Scene, counts: bool) -> int:
    """Optimizer steps of a run."""
    return scene.warm_up + scene.timed + (COUNTED if counts else 0)


def measure_ours(parts: Parts) -> None:
    """The parts of a run of this project, in a terminal or in ComfyUI, once its modules are imported."""
    parts.measure_everywhere("trainer.files.storage", ("sha256_of",), "hashing")
    parts.measure_everywhere("nodes.weights", ("digest_of",), "hashing")
    parts.measure_everywhere("trainer.base.stored.stored_base", ("load_base",), "base")
    parts.measure_everywhere("trainer.base.sd.denoiser", ("DiffusersUNet.build",), "base")
    parts.measure_everywhere("nodes.wired.denoiser", ("WiredDenoiser.build",), "base")
    parts.measure_everywhere("trainer.runs.preparation", ("encode",), "encoding")
    parts.measure_everywhere("trainer.shell.recipe", ("with_preservation",), "class images")
    parts.measure_everywhere("nodes.priors", ("GenerateClassPriors.execute",), "class images")


def measure_diffusers(parts: Parts) -> None:
    """The parts of diffusers' script, once diffusers and transformers are imported."""
    import diffusers
    import transformers

    for holder, name, part in (
        (diffusers.UNet2DConditionModel, "from_pretrained", "base"),
        (diffusers.AutoencoderKL, "from_pretrained", "base"),
        (diffusers.DiffusionPipeline, "from_pretrained", "base"),
        (transformers.PreTrainedModel, "from_pretrained", "base"),
        (transformers.CLIPTextModel, "forward", "encoding"),
        (diffusers.AutoencoderKL, "encode", "encoding"),
        (diffusers.StableDiffusionPipeline, "__call__", "class images"),
    ):
        original = getattr(holder, name)
        if name == "from_pretrained":
            # Bound to its class; a subclass that inherits it keeps being the class that is read.
            function = original.__func__
            setattr(holder, name, classmethod(parts.measure(function, part)))
        else:
            setattr(holder, name, parts.measure(original, part))


def measure_comfyui(parts: Parts) -> None:
    """The parts of ComfyUI's own nodes, once it is imported."""
    parts.measure_everywhere("comfy.sd", ("load_checkpoint_guess_config",), "base")
    parts.measure_everywhere("comfy.sd", ("VAE.encode", "CLIP.encode_from_tokens_scheduled"), "encoding")
    parts.measure_everywhere("comfy.model_management", ("load_models_gpu",), "base")
