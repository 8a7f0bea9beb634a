"""All differences between families of base models. Adding a family means adding an entry to ``FAMILIES``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import SubjectBoothError
from .unsupported import input_kind


@dataclass(frozen=True)
class TextEncoderShape:
    """A CLIP text encoder of a family.

    Attributes:
        name: ComfyUI's name for it: l, h or g.
        width, layers, heads, activation: of the transformer; its MLP is 4 times as wide.
        padding: the token that pads a chunk.
        layer: the layer whose hidden states the UNet takes, -1 for the last, if CLIP skip does not set another.
        norms_hidden_layer: whether the final norm is applied to these hidden states.
        projects: whether it has a projection, which gives the pooled prompt.
        prefix: kohya's key prefix.
        single_file: its key prefix in single-file checkpoints.
        open_clip: whether single files have it in OpenCLIP's layout.
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
    """A family's UNet, text encoders, and names in LoRA files.

    Attributes:
        name: the common name ("SD 1.x").
        context_dim: width of the UNet's text input.
        linear_projection: whether proj_in/proj_out of the attention blocks are Linear instead of 1x1 Conv.
        adm_channels: width of the additional vector input (pooled text and sizes); None without one.
        heads: number of attention heads if it is fixed; None if the width of a head is, at 64.
        text_encoders: in the order in which their hidden states are concatenated.
        kohya_ldm_names: whether LoRA files name the UNet's layers as single-file checkpoints do, not as diffusers does.
        latent_scale: factor from the VAE's latents to the UNet's.
        default_resolution: side of the training images in pixels, of models that predict noise and of those that
            predict v.
        kohya_base_model_version: ``ss_base_model_version``, likewise; other tools identify the family by it.
        kohya_v2: ``ss_v2``.
        modelspec_architecture: ``modelspec.architecture`` without the ``/lora``, likewise.
        v_told_by: a bias of the UNet whose standard deviation exceeds 0.09 in models that predict v; ComfyUI uses it
            for single files that do not state it. None if only marks in the file state it.
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
"""Width of the text input of SDXL's refiner, which uses only the second text encoder."""


def native_resolution(family: Family, prediction_type: str) -> int:
    """Side in pixels of the images that such a base was trained on."""
    return family.default_resolution[prediction_type == "v_prediction"]


def family_of(unet_shape: dict[str, Any], where: str) -> Family:
    """The family whose UNet has this shape.

    Args:
        unet_shape: ``context_dim``, ``linear_projection``, ``adm_channels`` and ``in_channels`` as read from the
            weights by :func:`trainer.base.sd.ldm_unet.unet_shape`.
        where: source of the weights, for the message.

    Raises:
        SubjectBoothError: no family has it, such as inpainting or edit models, SD 3 and Flux.
    """
    supported = ", ".join(family.name for family in FAMILIES)
    if unet_shape["in_channels"] != 4:
        raise SubjectBoothError(
            f"the UNet has {unet_shape['in_channels']} input channels: it is {input_kind(unet_shape['in_channels'])}",
            "a text-to-image model, which has 4",
            "load the model it was made from",
            where,
        )
    if unet_shape["context_dim"] == REFINER_CONTEXT:
        raise SubjectBoothError(
            "the model is SDXL's refiner, which only refines finished images",
            f"a model of one of these families: {supported}",
            "train the SDXL base model, and leave the refiner out",
            where,
        )
    for family in FAMILIES:
        if all(
            getattr(family, name) == unet_shape[name] for name in ("context_dim", "linear_projection", "adm_channels")
        ):
            return family
    raise SubjectBoothError(
        f"the UNet's text input is {unet_shape['context_dim']} wide",
        f"a model of one of these families: {supported}",
        "use a checkpoint of one of these families",
        where,
    )
