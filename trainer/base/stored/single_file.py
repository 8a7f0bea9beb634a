"""Reads single-file checkpoints, in the layout of the original Stable Diffusion releases."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from ...errors import SubjectBoothError
from ...topics import Topic
from ..sd import families
from ..sd.codecs import KLCodec, TinyCodec, from_ldm_vae, from_taesd
from ..sd.families import Family, TextEncoderShape
from ..sd.text_encoder import (
    INNER,
    from_open_clip,
    lacks_last_layer,
    refuse_missing_last_layer,
    transformers_name,
    with_last_layer,
)
from ..sd.unsupported import architecture, is_bare_unet, refuse_sampling_marks
from .parts import StoredParts, WeightsReader, missing_part, stable_diffusion_schedule
from .tensors import StoredTensors

UNET, VAE = "model.diffusion_model.", "first_stage_model."
V_SPREAD = 0.09
"""Threshold for the standard deviation of a family's ``v_told_by``; it is larger in models that predict v."""


def read_file(path: Path) -> StoredParts:
    """The parts of a .safetensors checkpoint. Reads only its header.

    Raises:
        SubjectBoothError: another format, or a missing part.
    """
    where = str(path)
    if path.suffix.lower() == ".gguf":
        raise SubjectBoothError(
            "the base is quantised to GGUF",
            "weights in fp32, fp16 or bf16",
            "load the unquantised .safetensors checkpoint",
            where,
        )
    if path.suffix.lower() != ".safetensors":
        raise SubjectBoothError(
            f"the checkpoint has the format {path.suffix or '(none)'}",
            "a .safetensors file",
            "convert it; pickled files are never opened",
            where,
        )
    whole = StoredTensors.open([path])
    refuse_sampling_marks(whole, where)
    unet, vae = whole.below(UNET), whole.below(VAE)
    if is_bare_unet(whole) or (is_bare_unet(unet) and len(unet) == len(whole)):
        raise SubjectBoothError(
            "the file has only a UNet, no text encoder and no VAE",
            "a checkpoint with all three",
            "use the checkpoint that this UNet belongs to, or one saved with all three",
            where,
            Topic.UNET,
        )
    if not unet:
        raise SubjectBoothError(
            f"the file is not a Stable Diffusion checkpoint ({architecture(whole)})",
            "a checkpoint with UNet, text encoder and VAE",
            "use an SD 1.x, SD 2.x or SDXL checkpoint",
            where,
        )
    if not vae and unet.shapes.get("input_blocks.0.0.weight") is not None:
        raise missing_part("VAE", where)

    def text(family: Family, clip_layer: int | None) -> list[WeightsReader]:
        return _text_encoders(whole, family, clip_layer, where)

    return StoredParts(
        files=(path,),
        unet=unet,
        text_encoders=text,
        codec=lambda family: _codec(vae, family, where),
        prediction_type=_prediction_type(whole),
        alphas_cumprod=stable_diffusion_schedule("ztsnr" in whole),
    )


def _prediction_type(whole: StoredTensors) -> str | None:
    """As stated by a mark in the file, or told from a weight, as ComfyUI does; None if unknown."""
    if "v_pred" in whole:
        return "v_prediction"
    for family in families.FAMILIES:
        if family.v_told_by is None or UNET + family.v_told_by not in whole:
            continue
        block = family.v_told_by.rsplit(".", 2)[0]
        context = whole.shapes.get(f"{UNET}{block}.attn2.to_k.weight")
        if context is not None and context[1] == family.context_dim:
            spread = float(whole[UNET + family.v_told_by].float().std(unbiased=False))
            return "v_prediction" if spread > V_SPREAD else None
    return None


def _text_encoders(
    whole: StoredTensors,
    family: Family,
    clip_layer: int | None,
    where: str,
) -> list[WeightsReader]:
    found: list[WeightsReader] = []
    for shape in family.text_encoders:
        own = whole.below(shape.single_file)
        if not own:
            raise missing_part("text encoder", where)
        names = [
            name.replace("transformer.resblocks.", f"{INNER}encoder.layers.")
            if shape.open_clip
            else transformers_name(name)
            for name in own
        ]
        if lacks_last_layer(names, shape):
            refuse_missing_last_layer(clip_layer, where)
        found.append(partial(_text_weights, own, shape))
    return found


def _text_weights(stored: StoredTensors, shape: TextEncoderShape) -> dict[str, torch.Tensor]:
    named = (
        from_open_clip(stored)
        if shape.open_clip
        else {transformers_name(name): tensor for name, tensor in stored.items()}
    )
    return with_last_layer(named, shape)


def _codec(vae: StoredTensors, family: Family, where: str) -> TinyCodec | KLCodec:
    tiny = {name: tensor for name, tensor in vae.items() if name.startswith("taesd_")}
    if tiny:
        return TinyCodec(from_taesd(tiny), where)
    return KLCodec(from_ldm_vae(vae), family.latent_scale, where)
