"""Identifies unsupported bases early and by name, from names, shapes and stored types of their weights.

The name prefixes of other architectures are those of their published checkpoints; ComfyUI uses the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...errors import SubjectBoothError

_ARCHITECTURES = (
    ("joint_blocks.", "SD 3"),
    ("double_blocks.", "Flux or one of its relatives"),
    ("double_layers.", "AuraFlow"),
    ("clf.1.", "Stable Cascade"),
    ("noise_refiner.", "Lumina 2 or Z-Image"),
    ("blocks.0.self_attn.", "a video model"),
    ("transformer_blocks.0.attn.add_q_proj.", "Qwen-Image or a relative"),
    ("transformer_blocks.0.cross_attn.", "PixArt or HunyuanDiT"),
    ("lora_unet_", "a LoRA, not a whole model"),
)

_INPUT_CHANNELS = {
    5: "a depth model",
    7: "an upscaler",
    8: "an edit model (InstructPix2Pix)",
    9: "an inpainting model",
}

_PLAIN = frozenset(("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"))
_INTEGER = frozenset(("I64", "I32", "int64", "int32"))
# Quantised checkpoints store scales and tables next to the weights.
_SCALES = (
    "scaled_fp8",
    ".scale_weight",
    ".scale_input",
    ".weight_scale",
    ".absmax",
    ".quant_map",
    ".qweight",
    ".comfy_quant",
)


def architecture(names: Iterable[str]) -> str:
    """The architecture of a model that is not a Stable Diffusion UNet, from its weights' names."""
    known = list(names)
    for mark, name in _ARCHITECTURES:
        if any(weight.startswith(mark) for weight in known):
            return name
    return "Flux, SD 3, a video model or similar"


def is_bare_unet(names: Iterable[str]) -> bool:
    """Whether the names are those of a Stable Diffusion UNet without prefix, in the original's or diffusers' naming."""
    known = set(names)
    return (
        "time_embed.0.weight" in known
        and "input_blocks.0.0.weight" in known
        or "time_embedding.linear_1.weight" in known
        and "conv_in.weight" in known
    )


def input_kind(channels: int) -> str:
    """The kind of model that has this number of input channels."""
    return _INPUT_CHANNELS.get(channels, "not a text-to-image model")


def refuse_quantised(dtypes: Mapping[str, str], where: str) -> None:
    """Reject a quantised base: its original weights are unknown.

    Args:
        dtypes: stored type of every weight, as named by torch or safetensors.
        where: source of the weights, for the message.

    Raises:
        SubjectBoothError: weights are stored in fp8, int8, nf4, GGUF or similar.
    """
    odd = next((kind for kind in dtypes.values() if kind not in _PLAIN | _INTEGER), None)
    if odd is None and any(name.endswith(_SCALES) for name in dtypes):
        odd = "fp8 with scales"
    if odd is not None:
        raise SubjectBoothError(
            f"the base is quantised to {odd}",
            "weights in fp32, fp16 or bf16",
            "load the unquantised checkpoint, with weight_dtype default",
            where,
        )


def refuse_sampling_marks(names: Iterable[str], where: str) -> None:
    """Reject checkpoints whose marks name an unsupported way of sampling.

    Raises:
        SubjectBoothError: the checkpoint is marked for EDM sampling.
    """
    edm = next((name for name in names if name in ("edm_mean", "edm_std", "edm_vpred.sigma_max")), None)
    if edm is not None:
        raise SubjectBoothError(
            f"the checkpoint samples with EDM (it has {edm!r})",
            "a checkpoint that predicts epsilon or v",
            "use a Stable Diffusion checkpoint without EDM",
            where,
        )
