"""The real trainer on a pretended card (tests/card/device.py), at full size: SD 1.5 at 512 px and SDXL at 1024 px.

The numbers of kernels, copies and waits are upper bounds that were recorded: a change that raises one should know it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.tests.card.rehearsal import HARNESS, REHEARSALS, SLOW

FAST = [name for name in REHEARSALS if name not in SLOW]
Found = dict[str, Any]

# A wait of the host for the card costs what is queued there: a forward pass.
WAITS = {"loop._finite": 1}
UPLOADS = {"resident.upload": 3, "conditioning.to": 1}
"""Noise and times, and of a photo's first use the photo and its prompt."""


@pytest.fixture(scope="module")
def rehearsed() -> Callable[[str], Found]:
    """What a rehearsal has found. All are made in one process of their own: a registered device stays."""
    names = [HARNESS, *FAST, *(SLOW if os.environ.get("SUBJECTBOOTH_SLOW") else ())]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("rehearsal.py")), *names],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    found = {line["rehearsal"]: line for line in map(json.loads, done.stdout.splitlines())}

    def get(name: str) -> Found:
        if name not in found:
            pytest.fail(f"the rehearsal ended before {name!r}:\n{done.stderr[-3000:]}")
        return found[name]

    return get


def test_the_card_itself_can_tell_right_from_wrong(rehearsed: Callable[[str], Found]) -> None:
    found = rehearsed(HARNESS)
    assert "same device" in found["mixed"] and "npu:0 and cpu" in found["mixed"]
    assert found["real"] == 256 * 256  # what is on the CPU is computed
    assert found["flop"] == 2 * 256**3
    assert found["kernels"] == 3  # the cast, the product and the sum; a view is none
    assert (found["casts"], found["cast_kernels"]) == (2 * 256**2, 1)
    assert found["peak"] == 256**2 * (4 + 2 + 2)
    assert found["syncs"] == {"elsewhere": 1}
    assert "out of memory" in found["room"]


def slow(test: Any) -> Any:
    return pytest.mark.slow(
        pytest.mark.skipif(
            not os.environ.get("SUBJECTBOOTH_SLOW"), reason="minutes of full-size models: set SUBJECTBOOTH_SLOW=1"
        )(test)
    )


@pytest.mark.parametrize("name", FAST)
def test_it_trains_within_its_plan_and_leaves_nothing(rehearsed: Callable[[str], Found], name: str) -> None:
    """That it trains at all says that no operation mixes devices."""
    _check(rehearsed(name), REHEARSALS[name])


@slow
@pytest.mark.parametrize("name", SLOW)
def test_so_does_everything_else(rehearsed: Callable[[str], Found], name: str) -> None:
    _check(rehearsed(name), REHEARSALS[name])


def _check(found: Found, settings: Found) -> None:
    assert len(found["steps"]) == settings.get("steps", 2)
    assert found["chosen"]["precision"] == settings["precision"]
    assert found["left"] <= 4096  # the noise schedule, which the base keeps
    plan, last = found["plan"], found["steps"][-1]
    if "capacity" in settings:
        assert last["peak"] <= settings["capacity"]
        return
    # Gradients come one after the other in the backward pass, while activations go; the plan adds both up.
    # In half the adapter's weights and gradients are there in half as well.
    copies = 0.0 if settings["precision"] == "fp32" else 0.5
    weights = int(plan["adapter"] / ((3 if "ema_decay" in settings else 2) + 2 * copies))
    states = plan["optimizer"] if len(found["steps"]) > 1 else 0
    needed = plan["base"] + plan["adapter"] + states + plan["activations"]
    # A text encoder's activations are only estimated: for SDXL's two encoders it is 1 % of the whole too little.
    assert last["peak"] <= needed * (1.02 if "train_text_encoder" in settings else 1)
    activations = last["peak"] - plan["base"] - (plan["adapter"] - weights * (1 + copies)) - states
    # Dropout's masks are planned with 4 bytes a number and have 1.
    if not {"train_text_encoder", "lora_dropout"} & settings.keys():
        assert plan["activations"] == pytest.approx(activations, rel=0.12)


def test_a_step_of_sd15_costs_what_it_should(rehearsed: Callable[[str], Found]) -> None:
    """One picture at 512 px: 0.8 TFLOP forward, as published for SD 1.5's UNet, and 1.2 times that backward, since the
    base's own weights need no gradients; with the LoRA."""
    step = rehearsed("sd1 bf16")["steps"][1]  # after a resume, with the optimizer's states there
    assert step["flop"] == pytest.approx(1.7245e12, rel=0.01)
    assert step["kernels"] <= 4290
    assert step["cast_kernels"] <= 6 and step["casts"] <= 3e5
    assert step["syncs"] == WAITS
    assert step["uploads"] == UPLOADS


def test_the_first_step_is_no_more_than_others_but_for_the_noise_schedule(rehearsed: Callable[[str], Found]) -> None:
    step = rehearsed("sd1 bf16")["steps"][0]
    # The next step's photo is drawn while the card still computes.
    assert step["uploads"] == {"resident.upload": 6, "conditioning.to": 2, "denoiser.noisy_latents": 1}
    assert step["syncs"] == WAITS


def test_a_picture_is_drawn_on_the_card(rehearsed: Callable[[str], Found]) -> None:
    found = rehearsed("sd1 bf16")
    assert found["pictures"] == [[1, 512, 512, 3]]
    drawing = found["validation"]
    assert drawing["flop"] > 2 * 0.67e12  # one step of two predictions, and the decoder
    # The finished latents come down once, not at each denoising step. (The codec's weights come and go as they must.)
    assert {place: count for place, count in drawing["syncs"].items() if "codecs" not in place} == {"sample.sample": 1}
    assert drawing["peak"] <= 2.95e9  # the decoder takes more than a step; without room for it, it runs on the CPU


def test_a_step_of_sdxl_costs_what_it_should(rehearsed: Callable[[str], Found]) -> None:
    """One picture at 1024 px, the forward pass computed twice by checkpointing; fp16's scaling waits once more."""
    step = rehearsed("sdxl fp16")["steps"][0]
    assert step["flop"] == pytest.approx(19.335e12, rel=0.01)
    assert step["kernels"] <= 21_240
    assert step["cast_kernels"] <= 11 and step["casts"] <= 1e6
    assert step["syncs"] == {**WAITS, "loop._learn": 1}
    assert step["uploads"] == {**UPLOADS, "conditioning.to": 2, "denoiser.noisy_latents": 1}


def test_a_run_that_is_too_large_steps_down(rehearsed: Callable[[str], Found]) -> None:
    found = rehearsed("sd1 fp16, too large")
    assert found["notes"] == ["out of memory: gradient checkpointing is now on"]
    assert found["chosen"]["gradient_checkpointing"] == "on"
    # No wait for the prompt's weights, which the CPU knows.
    assert found["steps"][0]["syncs"] == {**WAITS, "loop._learn": 1}
    assert found["steps"][0]["uploads"].get("text_encoder.on", 0) <= 2


@slow
def test_one_that_is_far_too_large_goes_on_with_one_picture_at_once(rehearsed: Callable[[str], Found]) -> None:
    found = rehearsed("sd1 fp16, far too large")
    assert found["notes"] == [
        "out of memory: gradient checkpointing is now on",
        "out of memory: the micro-batch size is now 1 instead of 2",
    ]
    assert found["chosen"]["pictures_per_forward"] == "1"
