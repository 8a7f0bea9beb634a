"""The same small random model twice: as a single file in the original layout, and as a folder saved by diffusers.

The layouts are those of the real families with reduced widths. The single file is written here; diffusers' converters
and `save_pretrained` turn it into the folder, so that none of the pack's code is involved.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from subjectbooth.tests.tiny import RandomWeights
from subjectbooth.trainer.base.sd import families
from subjectbooth.trainer.base.sd.families import Family, TextEncoderShape

StateDict = dict[str, torch.Tensor]


def _narrow(family: Family, context: int, **changes: Any) -> Family:
    shapes = tuple(
        dataclasses.replace(shape, width=width, layers=layers, heads=2)
        for shape, (width, layers) in zip(family.text_encoders, changes.pop("text"), strict=True)
    )
    return dataclasses.replace(family, context_dim=context, text_encoders=shapes, **changes)


NARROW = {
    "SD 1.x": _narrow(families.SD1, 32, text=[(32, 2)], heads=4),
    "SD 2.x": _narrow(families.SD2, 48, text=[(48, 3)]),
    "SDXL": _narrow(families.SDXL, 80, text=[(32, 3), (48, 3)], adm_channels=48 + 6 * 256),
}
# (channels, transformer blocks) of each level.
LEVELS = {"SD 1.x": ((32, 1), (64, 0)), "SD 2.x": ((64, 1), (64, 0)), "SDXL": ((64, 0), (64, 2))}


def unet(family: Family, levels: Sequence[tuple[int, int]], seed: int) -> StateDict:
    """UNet in LDM's layout with two blocks per level."""
    make = RandomWeights(seed)
    first = levels[0][0]
    make.linear("time_embed.0", 4 * first, first)
    make.linear("time_embed.2", 4 * first, 4 * first)
    if family.adm_channels is not None:
        make.linear("label_emb.0.0", 4 * first, family.adm_channels)
        make.linear("label_emb.0.2", 4 * first, 4 * first)
    make.conv("input_blocks.0.0", first, 4, 3)
    skips, n, index = [first], first, 1
    for level, (width, depth) in enumerate(levels):
        for _ in range(2):
            _block(make, family, f"input_blocks.{index}", n, width, 4 * first, depth)
            n, index = width, index + 1
            skips.append(n)
        if level < len(levels) - 1:
            make.conv(f"input_blocks.{index}.0.op", n, n, 3)
            index += 1
            skips.append(n)
    _resnet(make, "middle_block.0", n, n, 4 * first)
    _transformer(make, family, "middle_block.1", n, max(depth for _, depth in levels[-1:]) or 1)
    _resnet(make, "middle_block.2", n, n, 4 * first)
    index = 0
    for level, (width, depth) in reversed(list(enumerate(levels))):
        for place in range(3):
            _block(make, family, f"output_blocks.{index}", n + skips.pop(), width, 4 * first, depth)
            n = width
            if level > 0 and place == 2:
                make.conv(f"output_blocks.{index}.{2 if depth else 1}.conv", n, n, 3)
            index += 1
    make.norm("out.0", first)
    make.conv("out.2", 4, first, 3)
    return make.tensors


def _block(make: RandomWeights, family: Family, name: str, n_in: int, n_out: int, time: int, depth: int) -> None:
    _resnet(make, f"{name}.0", n_in, n_out, time)
    if depth:
        _transformer(make, family, f"{name}.1", n_out, depth)


def _resnet(make: RandomWeights, name: str, n_in: int, n_out: int, time: int) -> None:
    make.norm(f"{name}.in_layers.0", n_in)
    make.conv(f"{name}.in_layers.2", n_out, n_in, 3)
    make.linear(f"{name}.emb_layers.1", n_out, time)
    make.norm(f"{name}.out_layers.0", n_out)
    make.conv(f"{name}.out_layers.3", n_out, n_out, 3)
    if n_in != n_out:
        make.conv(f"{name}.skip_connection", n_out, n_in, 1)


def _transformer(make: RandomWeights, family: Family, name: str, n: int, depth: int) -> None:
    make.norm(f"{name}.norm", n)
    for part in ("proj_in", "proj_out"):
        if family.linear_projection:
            make.linear(f"{name}.{part}", n, n)
        else:
            make.conv(f"{name}.{part}", n, n, 1)
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        for attention, context in (("attn1", n), ("attn2", family.context_dim)):
            make.linear(f"{block}.{attention}.to_q", n, n, bias=False)
            make.linear(f"{block}.{attention}.to_k", n, context, bias=False)
            make.linear(f"{block}.{attention}.to_v", n, context, bias=False)
            make.linear(f"{block}.{attention}.to_out.0", n, n)
        make.linear(f"{block}.ff.net.0.proj", 8 * n, n)
        make.linear(f"{block}.ff.net.2", n, 4 * n)
        for i in (1, 2, 3):
            make.norm(f"{block}.norm{i}", n)


def clip_text(shape: TextEncoderShape, seed: int) -> StateDict:
    """CLIP text encoder in transformers' layout."""
    make = RandomWeights(seed)
    make.normal("embeddings.token_embedding.weight", (49408, shape.width), 0.5)
    make.normal("embeddings.position_embedding.weight", (77, shape.width), 0.3)
    for layer in range(shape.layers):
        name = f"encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            make.linear(f"{name}.self_attn.{part}", shape.width, shape.width)
        make.linear(f"{name}.mlp.fc1", 4 * shape.width, shape.width)
        make.linear(f"{name}.mlp.fc2", shape.width, 4 * shape.width)
        for i in (1, 2):
            make.norm(f"{name}.layer_norm{i}", shape.width)
    make.norm("final_layer_norm", shape.width)
    return {f"text_model.{name}": tensor for name, tensor in make.tensors.items()}


def open_clip(text: StateDict, shape: TextEncoderShape, projection: torch.Tensor) -> StateDict:
    """The same in OpenCLIP's layout, used in single files for SD 2.x and SDXL's second text encoder."""
    inside = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    outside = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    made = {ours: text[f"text_model.{name}"] for name, ours in outside.items()}
    for layer in range(shape.layers):
        name, theirs = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            made[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(
                [text[f"{name}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
            made |= {f"{theirs}.{ours}.{kind}": text[f"{name}.{module}.{kind}"] for module, ours in inside.items()}
    return made | {"text_projection": projection.T.contiguous(), "logit_scale": torch.tensor(4.6)}


def vae(seed: int, widths: Sequence[int] = (32, 32, 64, 64), latents: int = 4) -> StateDict:
    """Stable Diffusion's VAE in LDM's layout, one block per level (two in the decoder)."""
    make = RandomWeights(seed)

    def resnet(name: str, n_in: int, n_out: int) -> None:
        make.norm(f"{name}.norm1", n_in)
        make.conv(f"{name}.conv1", n_out, n_in, 3)
        make.norm(f"{name}.norm2", n_out)
        make.conv(f"{name}.conv2", n_out, n_out, 3, gain=0.5)
        if n_in != n_out:
            make.conv(f"{name}.nin_shortcut", n_out, n_in, 1)

    def middle(name: str, n: int) -> None:
        resnet(f"{name}.block_1", n, n)
        make.norm(f"{name}.attn_1.norm", n)
        for part in ("q", "k", "v", "proj_out"):
            make.conv(f"{name}.attn_1.{part}", n, n, 1)
        resnet(f"{name}.block_2", n, n)

    make.conv("encoder.conv_in", widths[0], 3, 3)
    n = widths[0]
    for level, width in enumerate(widths):
        resnet(f"encoder.down.{level}.block.0", n, width)
        n = width
        if level < len(widths) - 1:
            make.conv(f"encoder.down.{level}.downsample.conv", n, n, 3)
    middle("encoder.mid", n)
    make.norm("encoder.norm_out", n)
    make.conv("encoder.conv_out", 2 * latents, n, 3)
    make.conv("quant_conv", 2 * latents, 2 * latents, 1)
    make.conv("post_quant_conv", latents, latents, 1)
    make.conv("decoder.conv_in", n, latents, 3)
    middle("decoder.mid", n)
    for level, width in reversed(list(enumerate(widths))):
        for block in range(2):
            resnet(f"decoder.up.{level}.block.{block}", n, width)
            n = width
        if level > 0:
            make.conv(f"decoder.up.{level}.upsample.conv", n, n, 3)
    make.norm("decoder.norm_out", n)
    make.conv("decoder.conv_out", 3, n, 3)
    return make.tensors


def write_pair(folder: Path, name: str, scheduler: dict[str, Any] | None = None) -> tuple[Path, Path]:
    """`(single file, diffusers folder)` of one random model of the family `name`, in fp32."""
    family, levels = NARROW[name], LEVELS[name]
    parts = unet(family, levels, 1)
    picture = vae(2)
    texts = [clip_text(shape, 3 + number) for number, shape in enumerate(family.text_encoders)]
    projections = [
        torch.randn(shape.width, shape.width, generator=torch.Generator().manual_seed(9)) / 7
        for shape in family.text_encoders
    ]
    single = {f"model.diffusion_model.{key}": tensor for key, tensor in parts.items()}
    single |= {f"first_stage_model.{key}": tensor for key, tensor in picture.items()}
    for shape, text, projection in zip(family.text_encoders, texts, projections, strict=True):
        stored = open_clip(text, shape, projection) if shape.open_clip else text
        single |= {f"{shape.single_file}{key}": tensor for key, tensor in stored.items()}
    file = folder / "single.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in single.items()}, file)
    target = folder / "pipeline"
    _save_unet(parts, family, levels, target / "unet")
    _save_vae(picture, family, target / "vae")
    for number, (shape, text, projection) in enumerate(zip(family.text_encoders, texts, projections, strict=True)):
        _save_text(text, shape, projection, target / ("text_encoder_2" if number else "text_encoder"))
    (target / "scheduler").mkdir()
    (target / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(
            {
                "_class_name": "EulerDiscreteScheduler",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "num_train_timesteps": 1000,
                **(scheduler or {}),
            }
        ),
        "utf-8",
    )
    return file, target


def _save_unet(parts: StateDict, family: Family, levels: Sequence[tuple[int, int]], target: Path) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    widths = tuple(width for width, _ in levels)
    config: dict[str, Any] = {
        "block_out_channels": widths,
        "layers_per_block": 2,
        "cross_attention_dim": family.context_dim,
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for _, depth in levels),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for _, depth in reversed(levels)),
        "attention_head_dim": family.heads or tuple(width // 64 for width in widths),
        "transformer_layers_per_block": tuple(max(1, depth) for _, depth in levels),
        "use_linear_projection": family.linear_projection,
    }
    if family.adm_channels is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": family.adm_channels,
        }
    model = UNet2DConditionModel(**config)
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in parts.items()}
    model.load_state_dict(convert_ldm_unet_checkpoint(prefixed, {**dict(model.config), "class_embed_type": None}))
    model.save_pretrained(target)


def _save_vae(parts: StateDict, family: Family, target: Path) -> None:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=family.latent_scale,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    model.load_state_dict(convert_ldm_vae_checkpoint(dict(parts), dict(model.config)))
    model.save_pretrained(target)


def _save_text(text: StateDict, shape: TextEncoderShape, projection: torch.Tensor, target: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    # As published: SD 2.x's folders omit the last layer, which is unused.
    layers = shape.layers - 1 if shape.name == "h" else shape.layers
    config = CLIPTextConfig(
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        hidden_act=shape.activation,
        projection_dim=shape.width,
        vocab_size=49408,
    )
    model = (CLIPTextModelWithProjection if shape.projects else CLIPTextModel)(config)
    state = {**text, "text_projection.weight": projection}
    own = {
        name: state[name if name in state else f"text_model.{name}"]
        for name in model.state_dict()
        if not name.endswith("position_ids")
    }
    model.load_state_dict(own, strict=False)
    model.save_pretrained(target)
