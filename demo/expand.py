"""Expand the compact weights to a full checkpoint in the layout of Stable Diffusion 1.5.

Repeating every channel r times does not change the statistics of GroupNorm and LayerNorm, so a net with each channel
repeated r times and its input-side weights divided by r computes the same function (Net2Net, Chen et al. 2016, without
the noise). The dot product of a head grows r times while attention only divides by another sqrt(r), so the query
weights are also divided by sqrt(r). TAESD has no norms: its channels are padded with zeros.

The compact file stores the *divided* weights in fp16, each once. Repeating them is exact, so the wide fp16 checkpoint
is as precise as the narrow model, which multiplies them back in fp32 (`narrow_state`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

UNET_REPEAT = 5
TEXT_REPEAT = 8
TEXT_LAYERS = 12
TEXT_WIDTH = 768
VOCABULARY = 49408
VAE_WIDTH = 64
LATENT_CHANNELS = 4
VAE_SCALE = 0.18215

WIDE_UNET = "model.diffusion_model."
WIDE_TEXT = "cond_stage_model.transformer.text_model."
WIDE_VAE = "first_stage_model."


def divisor(key: str) -> float:
    """The factor by which the weight *key* ('unet.…', 'text.…' or 'vae.…') is larger in the narrow model."""
    part, name = key.split(".", 1)
    if part == "unet":
        # The latents and the sinusoidal features are the two inputs that are not repeated.
        if name in ("input_blocks.0.0.weight", "time_embed.0.weight") or not name.endswith(".weight"):
            return 1.0
        if ".to_q." in name:
            return UNET_REPEAT * math.sqrt(UNET_REPEAT)
        if ".attn2.to_k." in name or ".attn2.to_v." in name:
            return float(TEXT_REPEAT)
        return 1.0 if _is_norm(name) else float(UNET_REPEAT)
    if part == "text":
        if ".q_proj." in name:
            root = math.sqrt(TEXT_REPEAT)
            return TEXT_REPEAT * root if name.endswith(".weight") else root
        is_linear = ".self_attn." in name or ".mlp." in name
        return float(TEXT_REPEAT) if is_linear and name.endswith(".weight") else 1.0
    return 1.0


def _is_norm(name: str) -> bool:
    return (
        ".norm" in name
        or name.startswith("out.0.")
        or ".in_layers.0." in name
        or ".out_layers.0." in name
    )  # fmt: skip


def pack_state(narrow: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Narrow fp32 weights -> the compact file's fp16 weights (integer tensors stay the same)."""
    packed = {}
    for key, value in narrow.items():
        if value.is_floating_point():
            value = (value.double() / divisor(key)).to(torch.float16)
        packed[key] = value.contiguous()
    return packed


def narrow_state(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `pack_state`, in fp32."""
    narrow = {}
    for key, value in packed.items():
        if value.is_floating_point():
            value = (value.double() * divisor(key)).float()
        narrow[key] = value
    return narrow


def _repeat(value: torch.Tensor, *repeats: int) -> torch.Tensor:
    for axis, count in enumerate(repeats):
        if count > 1:
            value = value.repeat_interleave(count, axis)
    return value.contiguous()


def _wide_unet(name: str, value: torch.Tensor) -> torch.Tensor:
    if name == "time_embed.0.weight":
        # Frequency i of the narrow model is frequency 5 i of the wide one; cosines come first, then sines.
        wide = value.new_zeros(value.shape[0], value.shape[1] * UNET_REPEAT)
        wide[:, ::UNET_REPEAT] = value
        return _repeat(wide, UNET_REPEAT)
    if name == "input_blocks.0.0.weight":
        return _repeat(value, UNET_REPEAT)
    if name == "out.2.weight":
        return _repeat(value, 1, UNET_REPEAT)
    if name == "out.2.bias":
        return value
    if ".attn2.to_k." in name or ".attn2.to_v." in name:
        return _repeat(value, UNET_REPEAT, TEXT_REPEAT)
    return _repeat(value, UNET_REPEAT, UNET_REPEAT) if value.dim() > 1 else _repeat(value, UNET_REPEAT)


def _text_shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes of all tensors of a CLIP ViT-L/14 text model."""
    width = TEXT_WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (VOCABULARY, width),
        "embeddings.position_embedding.weight": (77, width),
    }
    for i in range(TEXT_LAYERS):
        layer = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}self_attn.{name}.weight"] = (width, width)
            shapes[f"{layer}self_attn.{name}.bias"] = (width,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}{name}.weight"] = (width,)
            shapes[f"{layer}{name}.bias"] = (width,)
        shapes[f"{layer}mlp.fc1.weight"] = (4 * width, width)
        shapes[f"{layer}mlp.fc1.bias"] = (4 * width,)
        shapes[f"{layer}mlp.fc2.weight"] = (width, 4 * width)
        shapes[f"{layer}mlp.fc2.bias"] = (width,)
    shapes["final_layer_norm.weight"] = shapes["final_layer_norm.bias"] = (width,)
    return shapes


def _wide_text(packed: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """CLIP's tensors. Unused tokens and layers are zero; a zero layer is the identity."""
    for name, shape in _text_shapes().items():
        wide = torch.zeros(shape, dtype=torch.float16)
        if name == "embeddings.token_embedding.weight":
            rows = _repeat(packed["text.token_embedding.weight"], 1, TEXT_REPEAT)
            wide[packed["text.vocabulary"]] = rows
        elif name == "embeddings.position_embedding.weight":
            wide = _repeat(packed["text.position_embedding.weight"], 1, TEXT_REPEAT)
        else:
            value = packed.get("text." + name.removeprefix("encoder."))
            if value is not None:
                wide = _repeat(value, *([TEXT_REPEAT] * value.dim()))
        yield name, wide


def _wide_vae(name: str, value: torch.Tensor) -> torch.Tensor:
    """Pad every inner channel axis to 64, but not the 3 image and 4 latent channels at the two ends."""
    first = name in ("encoder.0.weight", "decoder.1.weight")
    last = name.rsplit(".", 1)[0] in ("encoder.14", "decoder.19")
    outputs = value.shape[0] if last else VAE_WIDTH
    pad = [0, outputs - value.shape[0]]
    if value.dim() > 1:
        inputs = value.shape[1] if first else VAE_WIDTH
        pad = [0, 0, 0, 0, 0, inputs - value.shape[1], *pad]
    return F.pad(value, pad)


def wide_tensors(packed: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors of the wide checkpoint, fp16, in a fixed order."""
    for key in sorted(packed):
        part, name = key.split(".", 1)
        if part == "unet":
            yield WIDE_UNET + name, _wide_unet(name, packed[key])
        elif part == "vae":
            net, inner = name.split(".", 1)
            yield f"{WIDE_VAE}taesd_{net}.{inner}", _wide_vae(name, packed[key])
    for name, value in _wide_text(packed):
        yield WIDE_TEXT + name, value
    # fp32, because it scales every latent, and fp16 would round it by a relative 2e-5.
    yield f"{WIDE_VAE}vae_scale", torch.tensor(VAE_SCALE)
    yield f"{WIDE_VAE}vae_shift", torch.tensor(0.0)


def wide_unet_weights(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The wide UNet's own tensors, fp32, without the checkpoint's prefix."""
    unet = ((name, value) for name, value in wide_tensors(packed) if name.startswith(WIDE_UNET))
    return {name.removeprefix(WIDE_UNET): value.float() for name, value in unet}
