"""What one training step asks of a card: kernels and waits of the host, beside those of a bare loop with peft.

What diffusers and peft cost is counted in the same test, so that another version of them changes nothing.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from subjectbooth.benchmarks.counting import Dispatched, outliving_inference_mode
from subjectbooth.benchmarks.floor import DTYPES, add_lora, bare_step
from subjectbooth.tests.small_base import small_base, small_priors, small_subject, small_unet
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import StepDone
from subjectbooth.trainer.learn.study import CALIBRATION_IMAGES
from subjectbooth.trainer.preserve.ways import WAYS, keeping_class
from subjectbooth.trainer.runs.run import Run

CONFIG = TrainConfig(steps=4, learning_rate=1e-3, rank=4, network_alpha=4.0, resolution=64, precision="fp32")

# Kernels more than those of the bare loop; fewer, as a product with a scale of 1 is left out of 32 layers, twice. What
# is added: photos, times and noise of a seed and a step's number, a loss for each picture, whether all is finite.
# The base's own predictions (teacher, dco) take about 240 kernels; curvature and weight_l2 take products for each of 5
# groups of layers, whatever their number.
KERNELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "none": ("none", {}, -38),
    "class_images": ("class_images", {}, -22),
    "teacher": ("teacher", {}, 220),
    "curvature": ("curvature", {}, 114),
    "weight_l2": ("weight_l2", {}, 75),
    "dco": ("dco", {}, 208),
    "bf16": ("none", {"precision": "bf16"}, -63),
    "bf16, text encoder": ("none", {"precision": "bf16", "train_text_encoder": True}, 100),
}
WAITS = {"loop._finite": 1}
"""Where the host reads what the device has computed: losses and gradient norm, after the optimizer."""
NUMBERS, CASTS, TEXT_CASTS = 4, 7, 8
"""Casts: of whole numbers and truth values in any precision; in half precision of noisy latents, prompt and time, the
prediction and its gradient, all weights of the LoRA together, and all their gradients; those of a text encoder."""
AVERAGE = 1
"""Kernels of the running average, whatever the number of layers."""


@pytest.fixture(autouse=True)
def _one_thread(torch_threads: Any) -> None:
    """Pictures are not shared out between threads, where nothing would be counted."""
    torch_threads(1)


def test_the_counter_can_tell() -> None:
    numbers = torch.randn(4, 4)
    with Dispatched() as counted:
        numbers.t().t().view(16)[:3].detach()
        torch.empty_like(numbers)
    assert (counted.kernels, counted.syncs) == (0, {})
    with Dispatched() as counted:
        torch._foreach_add_([numbers @ numbers, numbers], 1.0)
    assert (counted.kernels, counted.syncs) == (2, {})
    for read in (
        lambda: float(numbers[0, 0]),
        lambda: bool(numbers[0, 0]),
        lambda: numbers[1].tolist(),
        lambda: numbers.cpu(),
        lambda: numbers.numpy(),
        lambda: numbers.nonzero(),
        lambda: numbers[torch.ones(4, dtype=torch.bool)],
        lambda: torch.equal(numbers, numbers),
    ):
        with Dispatched() as counted:
            read()
        assert counted.syncs == {"elsewhere": 1}


def test_attention_counts_the_same_in_one_kernel_or_in_several() -> None:
    query, key, value = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (16, 5, 5))
    one, several = Dispatched(), Dispatched()
    with one:
        torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
    with several:
        ((query @ key.mT / 8**0.5).softmax(-1) @ value).sum().backward()
    assert one.kernels < several.kernels
    assert one.flop == several.flop == 6 * 2 * (2 * 3 * 16 * 5 * 8)


def test_casts_are_counted() -> None:
    numbers = torch.randn(4, 4)
    with Dispatched() as counted:
        numbers.half().float()
        numbers.float()
        numbers.clone().copy_(numbers)
    assert (counted.kernels, counted.cast_kernels, counted.casts) == (4, 2, 16 * (2 + 4))


def test_counting_goes_on_after_inference_mode_in_which_it_began() -> None:
    numbers = torch.randn(4, 4)
    with ExitStack() as stack:
        stack.enter_context(outliving_inference_mode())
        with ExitStack() as block:
            block.enter_context(torch.inference_mode(False))
            counted = stack.enter_context(Dispatched())
            numbers.exp()
        numbers.exp()
        with torch.inference_mode():
            numbers.exp()
        numbers.exp()
    numbers.exp()
    with torch.inference_mode():
        numbers.exp()
    numbers.exp()
    assert counted.kernels == 4


@pytest.mark.parametrize("row", KERNELS)
def test_a_step_costs_no_more_than_it_did(tmp_path: Path, row: str) -> None:
    way, changes, more = KERNELS[row]
    step, bare = _step(tmp_path, way, **changes), _bare_step(way in ("class_images", "teacher"))
    assert bare.kernels > 600 and not bare.syncs
    assert step.kernels - bare.kernels <= more
    assert _waits(step) == WAITS
    if changes == {"precision": "bf16"}:
        bare = _bare_step(False, "bf16")
        assert bare.cast_kernels > 100 and step.kernels <= 0.7 * bare.kernels
    text = changes.get("train_text_encoder", False)
    numbers = NUMBERS + (way == "teacher")  # which images are to be predicted as the base does
    assert step.cast_kernels <= numbers + CASTS * (changes.get("precision") == "bf16") + TEXT_CASTS * text


def test_every_way_to_keep_the_class_is_counted() -> None:
    assert {way for way, *_ in KERNELS.values()} == set(WAYS)


def test_the_running_average_is_one_kernel_for_all_layers(tmp_path: Path) -> None:
    plain, averaged = _step(tmp_path / "plain", "none"), _step(tmp_path / "averaged", "none", ema_decay=0.99)
    assert averaged.kernels - plain.kernels == AVERAGE
    assert _waits(averaged) == WAITS


def test_validation_images_are_less_than_a_tenth_of_a_default_run() -> None:
    """In forward passes of the network. A backward pass takes 1.2 of them and SD 1.5's decoder 3.1, as counted in
    tests/card; the study of the base and its calibration are those of the default way to keep the class."""
    config, way = TrainConfig(validation_prompts=("a photo of {subject}",)), keeping_class(None, "dog")
    drawn = sum(config.validation_is_due(step) for step in range(1, config.steps + 1))
    images = drawn * (2 * config.validation_steps + 3.1)
    study = 2.2 * way.study_images + (1 + 2.2) * CALIBRATION_IMAGES
    assert drawn == 5 and study > 100
    assert images < 0.1 * (images + study + 2.2 * config.steps)


def _waits(step: Dispatched) -> dict[str, int]:
    """Without what is drawn, which is on the host on every device."""
    return {place: count for place, count in step.syncs.items() if not place.startswith(("draws.", "base_images."))}


def _step(root: Path, way: str, **changes: Any) -> Dispatched:
    """The third of four steps: neither the first, which sets things up, nor the last, which writes the LoRA."""
    preservation = keeping_class(small_priors() if way == "class_images" else None, "dog", way)
    config = dataclasses.replace(CONFIG, **changes)
    events = Run(small_base(), small_subject(), preservation, config, root, torch.device("cpu")).events()
    for event in events:
        if isinstance(event, StepDone) and event.step == 2:
            break
    with Dispatched() as counted:
        event = next(events)
    assert isinstance(event, StepDone) and event.step == 3
    events.close()
    return counted


def _bare_step(class_images: bool, precision: str = "fp32") -> Dispatched:
    from diffusers import DDPMScheduler

    unet, count = small_unet().to(DTYPES[precision]).train(), 2 if class_images else 1
    parameters = add_lora(unet, CONFIG.rank)
    latents, prompts = torch.randn(count, 4, 8, 8), torch.randn(count, 77, 16)
    step = bare_step(unet, parameters, latents, prompts, DDPMScheduler(), class_images, precision)
    step()
    step()
    with Dispatched() as counted:
        step()
    return counted
