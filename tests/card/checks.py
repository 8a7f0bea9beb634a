"""What only a GPU can show, as functions: scripts/check_gpu.py runs them all and prints a table, test_gpu.py has each
as a test. On a CPU, which is for seeing that they themselves run, the model is small.

Each takes a :class:`Bench` and returns its figure as a sentence. It raises AssertionError where the figure is wrong and
:class:`NotHere` where something is missing that it needs.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import torch

from subjectbooth.trainer.machine import numerics
from subjectbooth.trainer.machine.numerics import has_tf32

from .bench import Bench, NotHere, Trained, empty, train

GB = 10**9
PLAN_MARGIN = 0.15
"""Share by which the real peak may be over the plan; the plan itself leaves a tenth of the free memory alone."""


@cache
def reference(bench: Bench) -> Trained:
    """The training that others are held against: fp32 without TF32."""
    with mock.patch.object(numerics, "has_tf32", lambda device: False):
        return train(bench)


def _close(found: Trained, wanted: Trained, losses: float, norms: float) -> str:
    """The figure of a comparison.

    Raises:
        AssertionError: something is not finite, or further off than these shares.
    """
    assert len(found.losses) == len(wanted.losses), f"{len(found.losses)} steps in place of {len(wanted.losses)}"
    for name, tensor in found.lora.items():
        assert bool(torch.isfinite(tensor).all()), f"{name} is not finite"
    ups = [tensor for name, tensor in found.lora.items() if "lora_up" in name]
    assert all(float(tensor.abs().max()) > 0 for tensor in ups), "some layers have not learned"
    off = max(abs(a - b) / abs(b) for a, b in zip(found.losses, wanted.losses, strict=True))
    # A step that overflowed in fp16 is left out, and has no norm.
    norms_of = [(a, b) for a, b in zip(found.norms, wanted.norms, strict=True) if math.isfinite(a)]
    assert norms_of, "every gradient has overflowed"
    norm = max(abs(a - b) / abs(b) for a, b in norms_of)
    figure = f"losses within {off:.1e}, gradient norms within {norm:.1e}"
    assert off <= losses and norm <= norms, f"{figure}; allowed are {losses:g} and {norms:g}"
    return figure


def fp32(bench: Bench) -> str:
    """Without TF32 two runs of the same settings agree."""
    with mock.patch.object(numerics, "has_tf32", lambda device: False):
        again = train(bench)
    same = all(torch.equal(again.lora[name], tensor) for name, tensor in reference(bench).lora.items())
    figure = _close(again, reference(bench), 1e-4, 1e-2)
    return "bit for bit the same twice" if same else f"not the same bits twice: {figure}"


def tf32(bench: Bench) -> str:
    """It is on inside a run, off after it, and near fp32."""
    if not has_tf32(bench.device):
        bench.needs_card()
        raise NotHere("this card has no TF32")
    before = torch.get_float32_matmul_precision()
    found = train(bench)
    assert torch.get_float32_matmul_precision() == before, "it is left on"
    exact, fast = min(reference(bench).seconds[1:]), min(found.seconds[1:])
    return f"{_close(found, reference(bench), 1e-2, 0.1)}; a step takes {fast:.2f} s, without {exact:.2f} s"


def bf16(bench: Bench) -> str:
    """Near fp32."""
    if bench.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise NotHere("this card has no bf16")
    found = train(bench, precision="bf16")
    assert found.chosen.precision == "bf16"
    return _close(found, reference(bench), 0.02, 0.2)


def fp16(bench: Bench) -> str:
    """Near fp32, with loss scaling whose scale is in the checkpoint."""
    bench.needs_card()
    # The scale starts at 65536 and halves where a gradient overflows: such a step is left out.
    found = train(bench, precision="fp16")
    assert found.chosen.precision == "fp16" and found.kept is not None
    scale = found.kept.scaler["scale"]
    return f"{_close(found, reference(bench), 0.02, 0.2)}; the scale is {scale:g} after 4 steps"


def text_encoder(bench: Bench) -> str:
    """Its LoRA learns in half precision too."""
    precision = "bf16" if bench.device.type == "cpu" or torch.cuda.is_bf16_supported(False) else "fp16"
    found = train(bench, precision=precision, train_text_encoder=True)
    layers = [tensor for name, tensor in found.lora.items() if name.startswith("lora_te") and "lora_up" in name]
    learned = sum(float(tensor.abs().max()) > 0 for tensor in layers)
    assert layers and all(bool(torch.isfinite(tensor).all()) for tensor in layers), "not finite"
    assert learned >= len(layers) - 4, f"{learned} of {len(layers)} layers have learned"
    return f"{precision}: {learned} of {len(layers)} layers have learned"


def xformers(bench: Bench) -> str:
    """Near torch's own attention."""
    bench.needs_card()
    if importlib.util.find_spec("xformers") is None:
        raise NotHere("needs the package xformers")
    found = train(bench, precision="fp16", attention="xformers")
    assert found.chosen.attention == "xformers", f"{found.chosen.attention} was used in its place"
    return _close(found, train(bench, precision="fp16"), 0.01, 0.1)


def adamw8bit(bench: Bench) -> str:
    """Learns as AdamW does, and its quantised state is in the checkpoint."""
    bench.needs_card()
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotHere("needs the package bitsandbytes")
    found = train(bench, optimizer="adamw8bit", stop=2)
    assert found.chosen.optimizer == "adamw8bit", f"{found.chosen.optimizer} was used in its place"
    resumed = train(bench, optimizer="adamw8bit", kept=found.kept)
    resumed.losses, resumed.norms = found.losses + resumed.losses, found.norms + resumed.norms
    return _close(resumed, reference(bench), 0.02, 0.2)


def step_down(bench: Bench) -> str:
    """A card that is too small for everything at once: the run steps down, and learns the same."""
    bench.needs_card()
    settings = {"precision": "bf16", "resolution": 64 if bench.small else 512, "steps": 3}
    whole = train(bench, gradient_checkpointing="off", **settings)
    less = train(bench, gradient_checkpointing="on", **settings)
    total = torch.cuda.get_device_properties(bench.device).total_memory
    # What others have of the card does not count: the fraction is of what this process may take.
    torch.cuda.set_per_process_memory_fraction(
        (whole.peak + less.peak) / 2 / total + empty(bench) / total, bench.device
    )
    try:
        found = train(bench, free=lambda _: None, **settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
    down = any("gradient checkpointing is now on" in note for note in found.notes)
    assert down, f"it did not step down: {found.notes}"
    return f"{len(found.notes)} step(s) down; {_close(found, whole, 1e-2, 0.1)}"


def resume(bench: Bench) -> str:
    """An interrupted run gives what an uninterrupted one gives."""
    first = train(bench, stop=2, ema_decay=0.9, train_text_encoder=True)
    second = train(bench, kept=first.kept, ema_decay=0.9, train_text_encoder=True)
    whole = train(bench, ema_decay=0.9, train_text_encoder=True)
    off = max(float((second.lora[name] - tensor).abs().max()) for name, tensor in whole.lora.items())
    largest = max(float(tensor.abs().max()) for tensor in whole.lora.values() if tensor.ndim)
    figure = "bit for bit" if off == 0 else f"within {off:.1e} of weights up to {largest:.1e}"
    assert off <= 1e-3 * largest, figure
    return figure


def validation(bench: Bench) -> str:
    """Pictures are finite, in 0..1 and no plain colour."""
    precision = "fp32" if bench.device.type == "cpu" else "auto"
    found = train(
        bench, steps=1, precision=precision, validation_prompts=("x",), validation_interval=0, validation_steps=4
    )
    assert len(found.pictures) == 1, f"{len(found.pictures)} pictures: {found.notes}"
    picture = found.pictures[0]
    assert bool(torch.isfinite(picture).all()), "not finite"
    darkest, lightest = float(picture.min()), float(picture.max())
    assert 0 <= darkest < lightest <= 1, f"{darkest} to {lightest}"
    return f"{tuple(picture.shape)}, {darkest:.2f} to {lightest:.2f}, {found.chosen.precision}"


def random_state(bench: Bench) -> str:
    """Neither the CPU's nor the card's random state is touched by a run."""
    cuda = bench.device.type == "cuda"
    before = torch.get_rng_state(), torch.cuda.get_rng_state(bench.device) if cuda else None
    train(bench, steps=2, lora_dropout=0.5)
    assert torch.equal(torch.get_rng_state(), before[0]), "the CPU's has moved"
    if cuda:
        assert torch.equal(torch.cuda.get_rng_state(bench.device), before[1]), "the card's has moved"
    return "as before" if cuda else "the CPU's as before"


def memory_left(bench: Bench) -> str:
    """Nothing of a run stays on the card."""
    bench.needs_card()
    train(bench, steps=1)  # what CUDA's libraries keep for themselves is there from now on
    before = empty(bench)
    for _ in range(2):
        train(
            bench,
            steps=1,
            precision="bf16",
            train_text_encoder=True,
            validation_prompts=("x",),
            validation_interval=0,
            validation_steps=1,
        )
    left = empty(bench) - before
    assert left < 2**20, f"{left / 2**20:.1f} MiB are left"
    return f"{left} bytes"


def _plan_against_peak(bench: Bench, name: str, size: int, **settings: Any) -> str:
    bench.needs_card()
    total = torch.cuda.get_device_properties(bench.device).total_memory
    config = {"resolution": 64 if bench.small else size, "steps": 2, "rank": 16, "network_alpha": 16.0, **settings}
    planned = train(bench, name, stop=1, **{**config, "gradient_checkpointing": "on"}).plan
    assert planned is not None
    figures = []
    for checkpointing in ("on", "off"):
        if checkpointing == "off" and planned.needed + (planned.activations or 0) * 11 > 0.9 * total:
            figures.append("everything kept: this card is too small")
            continue
        found = train(bench, name, **config, gradient_checkpointing=checkpointing)
        assert found.plan is not None
        share = found.peak / found.plan.needed
        figures.append(f"checkpointing {checkpointing}: {found.peak / GB:.2f} GB, planned {found.plan.needed / GB:.2f}")
        assert share <= 1 + PLAN_MARGIN, "; ".join(figures)
    return "; ".join(figures)


def plan_sd1(bench: Bench) -> str:
    """SD 1.5 at 512 px, two pictures: the real peak is no more than planned."""
    return _plan_against_peak(bench, "sd1", 512, precision="bf16")


def plan_sd1_fp32(bench: Bench) -> str:
    """The same in fp32."""
    return _plan_against_peak(bench, "sd1", 512, precision="fp32")


def plan_sdxl(bench: Bench) -> str:
    """SDXL at 1024 px, two pictures."""
    return _plan_against_peak(bench, "sdxl", 1024, precision="bf16")


CHECKS: dict[str, Callable[[Bench], str]] = {
    "fp32 twice": fp32,
    "tf32": tf32,
    "bf16": bf16,
    "fp16 with loss scaling": fp16,
    "resume": resume,
    "text encoder": text_encoder,
    "validation pictures": validation,
    "random state": random_state,
    "memory left": memory_left,
    "out of memory": step_down,
    "plan of SD 1.5": plan_sd1,
    "plan of SDXL": plan_sdxl,
    "8-bit Adam": adamw8bit,
    "xformers": xformers,
    "plan of SD 1.5 in fp32": plan_sd1_fp32,
}
"""In the order of their value: what comes last may get no time."""
