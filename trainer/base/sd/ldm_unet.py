"""Maps a UNet in the single-file layout (LDM) to a diffusers ``UNet2DConditionModel``.

ComfyUI and single files number all blocks consecutively, diffusers numbers them by level and kind. The arithmetic is
the same, so weights only need new names. Everything is derived from the tensors' names and shapes, without a
configuration file and for any number of levels and blocks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ...errors import SubjectBoothError
from .families import Family
from .unsupported import architecture

Shapes = Mapping[str, torch.Size]

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def unet_shape(shapes: Shapes, where: str) -> dict[str, Any]:
    """What distinguishes families: ``in_channels, context_dim, linear_projection, adm_channels``.

    Raises:
        SubjectBoothError: the weights are not an LDM UNet with cross-attention.
    """
    first = shapes.get("input_blocks.0.0.weight")
    context = next((s for name, s in shapes.items() if name.endswith("attn2.to_k.weight")), None)
    projection = next((s for name, s in shapes.items() if name.endswith(".proj_in.weight")), None)
    if first is None or context is None or projection is None:
        raise SubjectBoothError(
            f"the model is not a Stable Diffusion UNet ({architecture(shapes)})",
            "a UNet with cross-attention, like Stable Diffusion's",
            "use an SD 1.x, SD 2.x or SDXL checkpoint",
            where,
        )
    adm = shapes.get("label_emb.0.0.weight")
    return {
        "in_channels": first[1],
        "context_dim": context[1],
        "linear_projection": len(projection) == 2,
        "adm_channels": adm[1] if adm is not None else None,
    }


def diffusers_config(shapes: Shapes, family: Family, where: str) -> dict[str, Any]:
    """Arguments of ``UNet2DConditionModel`` for weights of these shapes.

    Raises:
        SubjectBoothError: blocks within a level differ, which diffusers does not support.
    """
    levels = _levels(shapes)
    heads = family.heads
    channels = tuple(level.channels for level in levels)
    middle = "middle_block.0.in_layers.0.weight" in shapes
    if any(level.attended not in (0, len(level.blocks)) for level in levels):
        raise SubjectBoothError(
            "only some blocks of a UNet level have cross-attention",
            "all blocks of a level or none",
            "use an unmodified checkpoint",
            where,
        )
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": channels,
        "layers_per_block": tuple(len(level.blocks) for level in levels),
        "down_block_types": tuple("CrossAttnDownBlock2D" if level.attended else "DownBlock2D" for level in levels),
        "up_block_types": tuple("CrossAttnUpBlock2D" if level.attended else "UpBlock2D" for level in reversed(levels)),
        "mid_block_type": _middle_block_type(shapes) if middle else None,
        "cross_attention_dim": family.context_dim,
        "attention_head_dim": heads if heads is not None else tuple(width // 64 for width in channels),
        "transformer_layers_per_block": tuple(max(1, level.depth) for level in levels),
        "use_linear_projection": family.linear_projection,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
    }
    if family.adm_channels is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": family.adm_channels,
        }
    return config


def diffusers_names(shapes: Shapes) -> dict[str, str]:
    """``{LDM weight name: diffusers weight name}`` for every weight of the UNet.

    Raises:
        SubjectBoothError: an unknown weight.
    """
    levels = _levels(shapes)
    modules = dict(_OUTSIDE)
    for number, level in enumerate(levels):
        for index, block in enumerate(level.blocks):
            _add_block(modules, f"input_blocks.{block}", f"down_blocks.{number}", index)
        if level.resampler is not None:
            modules[f"input_blocks.{level.resampler}.0.op"] = f"down_blocks.{number}.downsamplers.0.conv"
    modules |= {f"middle_block.0.{ldm}": f"mid_block.resnets.0.{ours}" for ldm, ours in _RESNET.items()}
    if _middle_block_type(shapes) == "UNetMidBlock2DCrossAttn":
        modules["middle_block.1"] = "mid_block.attentions.0"
        modules |= {f"middle_block.2.{ldm}": f"mid_block.resnets.1.{ours}" for ldm, ours in _RESNET.items()}
    block = 0
    for number, level in enumerate(reversed(levels)):
        # The way up has one more block per level, for the skip connection from before the level's first block.
        for index in range(len(level.blocks) + 1):
            _add_block(modules, f"output_blocks.{block}", f"up_blocks.{number}", index)
            for inside in ("1", "2"):
                if f"output_blocks.{block}.{inside}.conv.weight" in shapes:
                    modules[f"output_blocks.{block}.{inside}.conv"] = f"up_blocks.{number}.upsamplers.0.conv"
            block += 1
    return {name: _rename(name, modules) for name in shapes}


def ldm_names(names: Iterable[str]) -> dict[str, str]:
    """``{diffusers weight name: LDM weight name}`` for a diffusers UNet; the inverse of :func:`diffusers_names`.

    Raises:
        SubjectBoothError: an unknown weight.
    """
    given = list(names)
    modules = {ours: ldm for ldm, ours in _OUTSIDE.items()}
    blocks = itertools.count(1)
    for level in range(_count(given, r"down_blocks\.(\d+)\.")):
        down = f"down_blocks.{level}"
        for index in range(_count(given, rf"down_blocks\.{level}\.resnets\.(\d+)\.")):
            _add_ldm_block(modules, f"input_blocks.{next(blocks)}", down, index)
        if f"{down}.downsamplers.0.conv.weight" in given:
            modules[f"{down}.downsamplers.0.conv"] = f"input_blocks.{next(blocks)}.0.op"
    for ldm, ours in (("middle_block.0", "mid_block.resnets.0"), ("middle_block.2", "mid_block.resnets.1")):
        modules |= {f"{ours}.{inside}": f"{ldm}.{name}" for name, inside in _RESNET.items()}
    modules["mid_block.attentions.0"] = "middle_block.1"
    blocks = itertools.count()
    for level in range(_count(given, r"up_blocks\.(\d+)\.")):
        up = f"up_blocks.{level}"
        for index in range(_count(given, rf"up_blocks\.{level}\.resnets\.(\d+)\.")):
            block = next(blocks)
            _add_ldm_block(modules, f"output_blocks.{block}", up, index)
            # The upsampler is last in the level's last block, after attention if there is one.
            attended = f"{up}.attentions.{index}.proj_in.weight" in given
            modules[f"{up}.upsamplers.0.conv"] = f"output_blocks.{block}.{2 if attended else 1}.conv"
    return {name: _rename(name, modules) for name in given}


class _Level:
    """A resolution level of the way down."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.resampler: int | None = None
        self.channels = 0
        self.attended = 0
        self.depth = 0


def _levels(shapes: Shapes) -> list[_Level]:
    count = 1 + max(_number(name, "input_blocks") for name in shapes if name.startswith("input_blocks."))
    levels = [_Level()]
    for block in range(1, count):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            levels[-1].resampler = block
            levels.append(_Level())
            continue
        level = levels[-1]
        level.blocks.append(block)
        level.channels = shapes[f"input_blocks.{block}.0.out_layers.3.weight"][0]
        depths = {
            _number(name, f"input_blocks.{block}.1.transformer_blocks")
            for name in shapes
            if name.startswith(f"input_blocks.{block}.1.transformer_blocks.")
        }
        level.attended += bool(depths)
        level.depth = max(level.depth, len(depths))
    return levels


def _middle_block_type(shapes: Shapes) -> str | None:
    if "middle_block.0.in_layers.0.weight" not in shapes:
        return None
    return "UNetMidBlock2DCrossAttn" if "middle_block.1.proj_in.weight" in shapes else "UNetMidBlock2D"


def _add_block(modules: dict[str, str], ldm: str, ours: str, index: int) -> None:
    modules |= {f"{ldm}.0.{inside}": f"{ours}.resnets.{index}.{name}" for inside, name in _RESNET.items()}
    modules[f"{ldm}.1"] = f"{ours}.attentions.{index}"


def _add_ldm_block(modules: dict[str, str], ldm: str, ours: str, index: int) -> None:
    modules |= {f"{ours}.resnets.{index}.{name}": f"{ldm}.0.{inside}" for inside, name in _RESNET.items()}
    modules[f"{ours}.attentions.{index}"] = f"{ldm}.1"


def _count(names: Iterable[str], numbered: str) -> int:
    found = (re.match(numbered, name) for name in names)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


def _rename(name: str, modules: dict[str, str]) -> str:
    """Replace the longest known module name that ``name`` starts with."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        known = modules.get(".".join(parts[:length]))
        if known is not None:
            return ".".join([known, *parts[length:]])
    raise SubjectBoothError(
        f"the UNet weight {name!r} is unknown",
        "a weight of the Stable Diffusion layout",
        "use an unmodified checkpoint",
        name,
    )


def _number(name: str, prefix: str) -> int:
    found = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
    if found is None:
        raise SubjectBoothError(
            f"the UNet weight {name!r} has no block number",
            f"a number after {prefix}",
            "use an unmodified checkpoint",
            name,
        )
    return int(found.group(1))
