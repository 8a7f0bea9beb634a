"""What a single file says of its prediction type, where no scheduler lies beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from subjectbooth.trainer.base.stored.single_file import read_file

BLOCK = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0"


def _biases(spread: float) -> torch.Tensor:
    """320 numbers whose standard deviation is ``spread``."""
    return spread * torch.tensor([1.0, -1.0]).repeat(160)


@pytest.mark.parametrize(
    ("context", "spread", "marks", "expected"),
    [
        (1024, 0.12, (), "v_prediction"),  # SD 2.x at 768 pixels
        (1024, 0.06, (), None),  # SD 2.x base at 512
        (768, 0.12, (), None),  # SD 1.x: its norms say nothing
        (2048, 0.06, ("v_pred", "ztsnr"), "v_prediction"),
        (768, 0.06, ("v_pred",), "v_prediction"),
    ],
)
def test_a_file_tells_by_its_marks_or_as_its_family_does(
    tmp_path: Path, context: int, spread: float, marks: tuple[str, ...], expected: str | None
) -> None:
    """ComfyUI's rules (0.3.75, SD20.model_type), so that the shell trains what ComfyUI samples."""
    path = tmp_path / "base.safetensors"
    safetensors.torch.save_file(
        {
            f"{BLOCK}.norm1.bias": _biases(spread),
            f"{BLOCK}.attn2.to_k.weight": torch.zeros(320, context),
            "first_stage_model.x": torch.zeros(1),
            **{mark: torch.zeros(0) for mark in marks},
        },
        path,
    )
    assert read_file(path).prediction_type == expected
