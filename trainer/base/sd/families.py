"""All that differs between families of base models. A new family is a new entry of ``FAMILIES`` and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import SubjectBoothError
from .unsupported import input_kind


@dataclass(frozen=True)
class TextEncoderShape:
    """One CLIP text encoder of a family.

    Attributes:
        name: what ComfyUI calls it: l, h or g.
        width, layers, heads, activation: of the transformer; its MLP is 4 times as wide.
        padding: the token that fills up a chunk.
        layer: the layer whose states the UNet takes, -1 for the last, unless CLIP skip says another.
        norms_hidden_layer: the final norm is applied to that layer's states.
        projects: gives the pooled prompt.
        prefix: kohya's key prefix.
        single_file: where a single-file checkpoint keeps it.
        open_clip: the single file keeps it in OpenCLIP's layout.
    """

    name: str
    width: int
    layers: int
    heads: int
    activation: str
    padding: int
    layer: int
    norms_hidden_layer: bool
    projects: bool
    prefix: str
    single_file: str
    open_clip: bool


@dataclass(frozen=True)
class Family:
    """What one family's UNet looks like, and how its LoRA files name things.

    Attributes:
        name: the name users know ("SD 1.x").
        context_dim: width of the text encoder's output(s) as the UNet sees it.
        linear_projection: proj_in/proj_out of the attention blocks are Linear instead of 1x1 Conv.
        adm_channels: width of the extra vector input (pooled text and sizes), None without one.
        heads: number of attention heads where it is fixed; None where the width of a head (64) is.
        text_encoders: in the order in which their states stand side by side.
        kohya_ldm_names: LoRA files name the UNet's layers as single-file checkpoints do, not as diffusers does.
        latent_scale: what the VAE's latents are multiplied by for the UNet.
        default_resolution: pixels a side that it was trained at: what predicts noise, and what predicts v.
        kohya_base_model_version: ``ss_base_model_version`` of what predicts noise and of what predicts v, which other
            tools tell the family by.
        kohya_v2: ``ss_v2``.
        modelspec_architecture: ``modelspec.architecture`` without the ``/lora``, likewise.
        v_told_by: a bias of the UNet whose standard deviation is over 0.09 in what was trained on v, by which ComfyUI
            tells single files that say nothing; None where a file's marks alone say it.
    """

    name: str
    context_dim: int
    linear_projection: bool
    adm_channels: int | None
    heads: int | None
    text_encoders: tuple[TextEncoderShape, ...]
    kohya_ldm_names: bool
    latent_scale: float
    default_resolution: tuple[int, int]
    kohya_base_model_version: tuple[str, str]
    kohya_v2: bool
    modelspec_architecture: tuple[str, str]
    v_told_by: str | None = None


SD1 = Family(
    name="SD 1.x",
    context_dim=768,
    linear_projection=False,
    adm_channels=None,
    heads=8,
    text_encoders=(
        TextEncoderShape(
            name="l",
            width=768,
            layers=12,
            heads=12,
            activation="quick_gelu",
            padding=49407,
            layer=-1,
            norms_hidden_layer=True,
            projects=False,
            prefix="lora_te",
            single_file="cond_stage_model.transformer.",
            open_clip=False,
        ),
    ),
    kohya_ldm_names=False,
    latent_scale=0.18215,
    default_resolution=(512, 512),
    kohya_base_model_version=("sd_v1", "sd_v1_v"),
    kohya_v2=False,
    modelspec_architecture=("stable-diffusion-v1", "stable-diffusion-v1"),
)

SD2 = Family(
    name="SD 2.x",
    context_dim=1024,
    linear_projection=True,
    adm_channels=None,
    heads=None,
    text_encoders=(
        TextEncoderShape(
            name="h",
            width=1024,
            layers=24,
            heads=16,
            activation="gelu",
            padding=0,
            layer=-2,
            norms_hidden_layer=True,
            projects=False,
            prefix="lora_te",
            single_file="cond_stage_model.model.",
            open_clip=True,
        ),
    ),
    kohya_ldm_names=False,
    latent_scale=0.18215,
    default_resolution=(512, 768),
    kohya_base_model_version=("sd_v2", "sd_v2_v"),
    kohya_v2=True,
    modelspec_architecture=("stable-diffusion-v2-512", "stable-diffusion-v2-768-v"),
    v_told_by="output_blocks.11.1.transformer_blocks.0.norm1.bias",
)

SDXL = Family(
    name="SDXL",
    context_dim=2048,
    linear_projection=True,
    adm_channels=2816,
    heads=None,
    text_encoders=(
        TextEncoderShape(
            name="l",
            width=768,
            layers=12,
            heads=12,
            activation="quick_gelu",
            padding=49407,
            layer=-2,
            norms_hidden_layer=False,
            projects=False,
            prefix="lora_te1",
            single_file="conditioner.embedders.0.transformer.",
            open_clip=False,
        ),
        TextEncoderShape(
            name="g",
            width=1280,
            layers=32,
            heads=20,
            activation="gelu",
            padding=0,
            layer=-2,
            norms_hidden_layer=False,
            projects=True,
            prefix="lora_te2",
            single_file="conditioner.embedders.1.model.",
            open_clip=True,
        ),
    ),
    kohya_ldm_names=True,
    latent_scale=0.13025,
    default_resolution=(1024, 1024),
    kohya_base_model_version=("sdxl_base_v1-0", "sdxl_base_v1-0"),
    kohya_v2=False,
    modelspec_architecture=("stable-diffusion-xl-v1-base", "stable-diffusion-xl-v1-base"),
)

FAMILIES: tuple[Family, ...] = (SD1, SD2, SDXL)

REFINER_CONTEXT = 1280
"""Text width of SDXL's refiner, which sees the second text encoder only."""


def native_resolution(family: Family, prediction_type: str) -> int:
    """Pixels a side that a base of this family was trained at."""
    return family.default_resolution[prediction_type == "v_prediction"]


def family_of(unet_shape: dict[str, Any], where: str) -> Family:
    """The family whose UNet has this shape.

    Args:
        unet_shape: ``context_dim``, ``linear_projection``, ``adm_channels`` and ``in_channels`` as read from the
            weights by :func:`trainer.base.sd.ldm_unet.unet_shape`.
        where: what the weights came from, for the message.

    Raises:
        SubjectBoothError: no family has it: an inpainting or edit model, SD 3, Flux and the like.
    """
    supported = ", ".join(family.name for family in FAMILIES)
    if unet_shape["in_channels"] != 4:
        raise SubjectBoothError(
            f"a UNet with {unet_shape['in_channels']} input channels, {input_kind(unet_shape['in_channels'])}",
            "a text-to-image model with 4",
            "load the model it was made from",
            where,
        )
    if unet_shape["context_dim"] == REFINER_CONTEXT:
        raise SubjectBoothError(
            "SDXL's refiner, which only finishes pictures",
            f"a model of one of: {supported}",
            "train the SDXL base model, and leave the refiner out",
            where,
        )
    for family in FAMILIES:
        if all(
            getattr(family, name) == unet_shape[name] for name in ("context_dim", "linear_projection", "adm_channels")
        ):
            return family
    raise SubjectBoothError(
        f"a UNet with a text width of {unet_shape['context_dim']}",
        f"a model of one of: {supported}",
        "use a checkpoint of one of these families",
        where,
    )
