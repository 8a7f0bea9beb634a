"""Counts a training step on the connected model, inside ComfyUI's process, beside a bare loop over the same network."""

from __future__ import annotations

import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch

from .predictions import pack_module

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


def counter() -> Any:
    """What the benchmark counts with."""
    package = types.ModuleType("subjectbooth")
    package.__path__ = [str(ROOT)]
    sys.modules.setdefault("subjectbooth", package)
    from subjectbooth.benchmarks.counting import Dispatched

    return Dispatched()


class ProbeStepCost:
    """Kernels, reads and casts of the third of four steps: the trainer's, and those of a bare loop."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",), "subject": ("SUBJECT",)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, model: Any, clip: Any, vae: Any, subject: Any) -> dict[str, Any]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # with more, some of them run where nothing is counted
        try:
            with torch.inference_mode(False):
                base = pack_module("nodes.wired.base").wired_base(model, clip, vae)
                config = pack_module("trainer.config").TrainConfig(
                    steps=4, rank=4, network_alpha=4.0, resolution=128, precision="fp32"
                )
                found = {"trainer": _trained(base, subject, config), "bare": _bare(base, config)}
        finally:
            torch.set_num_threads(threads)
        report = {
            name: {
                "kernels": counted.kernels,
                "syncs": sum(counted.syncs.values()),
                "casts": counted.cast_kernels,
                "flop": counted.flop,
            }
            for name, counted in found.items()
        }
        return {"ui": {"report": [report]}}


def _trained(base: Any, subject: Any, config: Any) -> Any:
    run = pack_module("trainer.runs.run").Run
    with tempfile.TemporaryDirectory() as folder:
        events = run(base, subject, None, config, Path(folder), CPU).events()
        for event in events:
            if type(event).__name__ == "StepDone" and event.step == 2:
                break
        with counter() as counted:
            assert next(events).step == 3
        events.close()
    return counted


def _bare(base: Any, config: Any) -> Any:
    denoiser, adapter = base.denoiser, pack_module("trainer.learn.adapter")
    network = denoiser.build(torch.float32)
    try:
        parameters = adapter.inject(network, config, denoiser.adapter_layers(network, config.lora_targets))
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        text = base.prompts.encode(["a photo of ohwx cat"])[0]
        latents = torch.randn(1, *denoiser.latent_size(128, 128))

        def step() -> None:
            noise = torch.randn_like(latents)
            times = denoiser.times(torch.rand(1, dtype=torch.float64))
            noisy = denoiser.noisy_latents(latents, noise, times)
            prediction = denoiser.predict(network, noisy, times, text)
            torch.nn.functional.mse_loss(prediction, noise).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(2):
            step()
        with counter() as counted:
            step()
        return counted
    finally:
        denoiser.release(network)


NODES = {"ProbeStepCost": ProbeStepCost}
