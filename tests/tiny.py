"""Small random models in Stable Diffusion 1.5's checkpoint layout, for tests.

ComfyUI recognises a single file as SD 1.5 if its UNet has `model_channels` 320, `context_dim` 768 and a convolution as
`proj_in`; levels and blocks are counted from the keys. So one level of one block, 25.8 M parameters, is the smallest.
The weights are random but seeded, and scaled so that nothing saturates. The weights of the autoencoder (TAESD's layout)
are set by hand to average colours, so that latents can be decoded back to the image.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

CHANNELS = 320
CONTEXT = 768
TIME = 4 * CHANNELS
TEXT_LAYERS = 12
VOCABULARY = 49408
LATENT_SCALE = 0.18215
# Part of the cache's path: increase it when the content of a file changes.
VERSION = 3

StateDict = dict[str, torch.Tensor]


class RandomWeights:
    """Fills a state dict with seeded random weights of suitable scale."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: StateDict = {}

    def normal(self, name: str, shape: tuple[int, ...], std: float) -> None:
        self.tensors[name] = torch.randn(shape, generator=self.generator) * std

    def linear(self, name: str, n_out: int, n_in: int, *, bias: bool = True, gain: float = 1.0) -> None:
        self.normal(f"{name}.weight", (n_out, n_in), gain / math.sqrt(n_in))
        if bias:
            self.normal(f"{name}.bias", (n_out,), 0.02)

    def conv(self, name: str, n_out: int, n_in: int, size: int, *, gain: float = 1.0) -> None:
        self.normal(f"{name}.weight", (n_out, n_in, size, size), gain / math.sqrt(n_in * size * size))
        self.normal(f"{name}.bias", (n_out,), 0.02)

    def norm(self, name: str, n: int) -> None:
        self.tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(n, generator=self.generator)
        self.normal(f"{name}.bias", (n,), 0.02)


def _res_block(make: RandomWeights, name: str, n_in: int, n_out: int) -> None:
    make.norm(f"{name}.in_layers.0", n_in)
    make.conv(f"{name}.in_layers.2", n_out, n_in, 3)
    make.linear(f"{name}.emb_layers.1", n_out, TIME)
    make.norm(f"{name}.out_layers.0", n_out)
    make.conv(f"{name}.out_layers.3", n_out, n_out, 3, gain=0.5)
    if n_in != n_out:
        make.conv(f"{name}.skip_connection", n_out, n_in, 1)


def _transformer(make: RandomWeights, name: str, n: int) -> None:
    make.norm(f"{name}.norm", n)
    make.conv(f"{name}.proj_in", n, n, 1)
    block = f"{name}.transformer_blocks.0"
    for attention, context in (("attn1", n), ("attn2", CONTEXT)):
        make.linear(f"{block}.{attention}.to_q", n, n, bias=False)
        make.linear(f"{block}.{attention}.to_k", n, context, bias=False)
        make.linear(f"{block}.{attention}.to_v", n, context, bias=False)
        make.linear(f"{block}.{attention}.to_out.0", n, n)
    make.linear(f"{block}.ff.net.0.proj", 8 * n, n)
    make.linear(f"{block}.ff.net.2", n, 4 * n)
    for i in (1, 2, 3):
        make.norm(f"{block}.norm{i}", n)
    make.conv(f"{name}.proj_out", n, n, 1, gain=0.5)


def unet(seed: int, levels: int = 1) -> StateDict:
    """UNet weights with the prefix `model.diffusion_model.`: `levels` (1 or 2) of one block with attention."""
    make = RandomWeights(seed)
    widths = [CHANNELS * 2**level for level in range(levels)]
    make.linear("time_embed.0", TIME, CHANNELS)
    make.linear("time_embed.2", TIME, TIME)
    make.conv("input_blocks.0.0", CHANNELS, 4, 3)
    skips, n, index = [CHANNELS], CHANNELS, 1
    for level, width in enumerate(widths):
        _res_block(make, f"input_blocks.{index}.0", n, width)
        _transformer(make, f"input_blocks.{index}.1", width)
        n, index = width, index + 1
        skips.append(n)
        if level < levels - 1:
            make.conv(f"input_blocks.{index}.0.op", n, n, 3)
            index += 1
            skips.append(n)
    _res_block(make, "middle_block.0", n, n)
    _transformer(make, "middle_block.1", n)
    _res_block(make, "middle_block.2", n, n)
    index = 0
    for level, width in reversed(list(enumerate(widths))):
        for i in range(2):
            _res_block(make, f"output_blocks.{index}.0", n + skips.pop(), width)
            _transformer(make, f"output_blocks.{index}.1", width)
            n = width
            if level > 0 and i == 1:
                make.conv(f"output_blocks.{index}.2.conv", n, n, 3)
            index += 1
    make.norm("out.0", CHANNELS)
    make.conv("out.2", 4, CHANNELS, 3, gain=0.7)
    return {f"model.diffusion_model.{name}": tensor for name, tensor in make.tensors.items()}


def text_encoder(seed: int) -> StateDict:
    """CLIP ViT-L's text encoder: random embeddings, two random layers, and ten zero layers (exact identities)."""
    make = RandomWeights(seed)
    make.normal("embeddings.token_embedding.weight", (VOCABULARY, CONTEXT), 0.5)
    make.normal("embeddings.position_embedding.weight", (77, CONTEXT), 0.1)
    for layer in range(TEXT_LAYERS):
        name = f"encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            make.linear(f"{name}.self_attn.{part}", CONTEXT, CONTEXT)
        make.linear(f"{name}.mlp.fc1", 4 * CONTEXT, CONTEXT)
        make.linear(f"{name}.mlp.fc2", CONTEXT, 4 * CONTEXT)
        for i in (1, 2):
            make.norm(f"{name}.layer_norm{i}", CONTEXT)
        if layer not in (0, TEXT_LAYERS - 1):
            for key in [k for k in make.tensors if k.startswith(f"{name}.")]:
                make.tensors[key] = torch.zeros_like(make.tensors[key])
    make.norm("final_layer_norm", CONTEXT)
    # Half precision keeps the file small, and converting back to fp32 is exact.
    return {f"cond_stage_model.transformer.text_model.{k}": t.half() for k, t in make.tensors.items()}


def autoencoder(seed: int) -> StateDict:
    """A TAESD-layout autoencoder that averages 8x8 pixels to one colour and back, with a faint random texture.

    The 4 latent channels are red, green, blue and brightness, centred on zero. The decoder's ReLUs need positive
    numbers, so each colour is passed through it as a pair (its positive and its negative part).
    """
    make = RandomWeights(seed)

    def conv(name: str, n_out: int, n_in: int, entries: dict[tuple[int, int], float], spread: bool, bias: bool) -> None:
        weight = torch.zeros(n_out, n_in, 3, 3)
        for (to, source), value in entries.items():
            if spread:  # a 2x2 mean at stride 2
                weight[to, source, 1:, 1:] = value / 4
            else:
                weight[to, source, 1, 1] = value
        # Faint noise on the unused channels, so that every weight has an effect.
        weight += 0.002 * torch.randn(weight.shape, generator=make.generator)
        make.tensors[f"{name}.weight"] = weight
        if bias:
            make.tensors[f"{name}.bias"] = torch.zeros(n_out)

    def block(name: str) -> None:
        for i in (0, 2, 4):
            make.normal(f"{name}.conv.{i}.weight", (64, 64, 3, 3), 0.01)
            make.normal(f"{name}.conv.{i}.bias", (64,), 0.001)

    encoder, decoder = "taesd_encoder", "taesd_decoder"
    keep = {(i, i): 1.0 for i in range(3)}
    conv(f"{encoder}.0", 64, 3, keep, False, True)
    position = 1
    for count in (1, 3, 3, 3):
        for _ in range(count):
            block(f"{encoder}.{position}")
            position += 1
        if position < 14:
            conv(f"{encoder}.{position}", 64, 64, keep, True, False)
            position += 1
    # Colours 0..1 become latents of about -1..1; the fourth is the mean of the three.
    to_latent = {(i, i): 2.0 for i in range(3)} | {(3, i): 2 / 3 for i in range(3)}
    conv(f"{encoder}.{position}", 4, 64, to_latent, False, True)
    make.tensors[f"{encoder}.{position}.bias"] = torch.full((4,), -1.0)

    pairs = {(2 * i, i): 1.0 for i in range(3)} | {(2 * i + 1, i): -1.0 for i in range(3)}
    conv(f"{decoder}.1", 64, 4, pairs, False, True)
    keep = {(i, i): 1.0 for i in range(6)}
    position = 3
    for count in (3, 3, 3):
        for _ in range(count):
            block(f"{decoder}.{position}")
            position += 1
        position += 1  # upsampling has no weights
        conv(f"{decoder}.{position}", 64, 64, keep, False, False)
        position += 1
    block(f"{decoder}.{position}")
    position += 1
    # 1.1 in total, because the decoder clamps its input softly with 3 tanh(x / 3).
    colours = {(i, 2 * i): 0.55 for i in range(3)} | {(i, 2 * i + 1): -0.55 for i in range(3)}
    conv(f"{decoder}.{position}", 3, 64, colours, False, True)
    make.tensors[f"{decoder}.{position}.bias"] = torch.full((3,), 0.5)
    make.tensors["vae_scale"] = torch.tensor(LATENT_SCALE)
    make.tensors["vae_shift"] = torch.tensor(0.0)
    return {f"first_stage_model.{name}": tensor for name, tensor in make.tensors.items()}


def style_lora(seed: int, rank: int = 4, alpha: float = 2.0, levels: int = 1, strength: float = 0.3) -> StateDict:
    """A random LoRA in kohya's layout over the attention of the tiny UNet and one layer of the text encoder."""
    from_sd = unet(0, levels)
    generator = torch.Generator().manual_seed(seed)
    tensors: StateDict = {}

    def add(name: str, n_out: int, n_in: int) -> None:
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, n_in, generator=generator) / math.sqrt(n_in)
        tensors[f"{name}.lora_up.weight"] = torch.randn(n_out, rank, generator=generator) * strength / math.sqrt(rank)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)

    blocks = {"middle_block.1": "mid_block_attentions_0", "input_blocks.1.1": "down_blocks_0_attentions_0"}
    for comfy_name, diffusers_name in blocks.items():
        for attention in ("attn1", "attn2"):
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                weight = from_sd[f"model.diffusion_model.{comfy_name}.transformer_blocks.0.{attention}.{part}.weight"]
                part_name = part.replace(".", "_")
                add(f"lora_unet_{diffusers_name}_transformer_blocks_0_{attention}_{part_name}", *weight.shape)
    add("lora_te_text_model_encoder_layers_0_self_attn_q_proj", CONTEXT, CONTEXT)
    return tensors


def _cached(folder: Path, name: str, build: object, metadata: dict[str, str] | None = None) -> Path:
    path = folder / f"v{VERSION}" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        tensors = {k: t.contiguous() for k, t in build().items()}  # type: ignore[operator]
        save_file(tensors, str(part), metadata=metadata)
        os.replace(part, path)
    return path


def tiny_checkpoint(folder: Path, *, levels: int = 1, seed: int = 7) -> Path:
    """Write (once) a full SD 1.5-layout checkpoint: about 350 MB with one level, 690 MB with two.

    Args:
        folder: the cache; the file is `folder/v<VERSION>/tiny15-<levels>-<seed>.safetensors`.
        levels: 1 = 25.8 M UNet parameters, latents of any even size; 2 = 107 M.
    """

    def build() -> StateDict:
        return unet(seed, levels) | text_encoder(seed + 1) | autoencoder(seed + 2)

    return _cached(folder, f"tiny15-{levels}-{seed}.safetensors", build)


def tiny_style_lora(folder: Path, *, levels: int = 1, seed: int = 11) -> Path:
    """Write (once) a random style LoRA for `tiny_checkpoint`, in kohya's layout, alpha 2 at rank 4."""
    return _cached(folder, f"style-{levels}-{seed}.safetensors", lambda: style_lora(seed, levels=levels))
