"""The order in which a diffusers UNet holds its layers, without building one.

Initial weights of a LoRA are drawn in this order, so that a run starts the same wherever it is trained.
"""

from __future__ import annotations

_PARTS = {
    part: number
    for number, part in enumerate(
        (
            "conv_in", "time_embedding", "add_embedding", "linear_1", "linear_2", "down_blocks", "up_blocks",
            "mid_block", "conv_norm_out", "conv_out", "attentions", "resnets", "downsamplers", "upsamplers", "norm",
            "proj_in", "transformer_blocks", "proj_out", "norm1", "attn1", "to_q", "to_k", "to_v", "to_out", "conv1",
            "time_emb_proj", "norm2", "attn2", "conv2", "norm3", "ff", "conv_shortcut",
        )
    )
}  # fmt: skip


def diffusers_order(layer: str) -> tuple[int, ...]:
    """A sort key of a layer's name in diffusers (``down_blocks.0.attentions.1.proj_in``)."""
    return tuple(int(part) if part.isdigit() else _PARTS.get(part, len(_PARTS)) for part in layer.split("."))
