"""What only a GPU can show. The same checks make the table of scripts/check_gpu.py; no card has run them yet."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKS = (
    "fp32 twice",
    "tf32",
    "bf16",
    "fp16 with loss scaling",
    "resume",
    "text encoder",
    "validation pictures",
    "random state",
    "memory left",
    "out of memory",
    "plan of SD 1.5",
    "plan of SDXL",
    "8-bit Adam",
    "xformers",
    "plan of SD 1.5 in fp32",
    "dynamic VRAM",
)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_card(name: str) -> None:
    import torch

    from subjectbooth.tests.card.bench import Bench, NotHere

    where = os.environ.get("COMFYUI_PATH")
    bench = Bench(torch.device("cuda", torch.cuda.current_device()), comfyui=Path(where) if where else None)
    try:
        print(_all()[name](bench))
    except NotHere as missing:
        pytest.skip(str(missing))


def test_each_check_is_a_test_here() -> None:
    assert tuple(_all()) == CHECKS


def _all() -> dict[str, Callable[..., str]]:
    from subjectbooth.tests.card.comfy_checks import ALL

    return ALL
