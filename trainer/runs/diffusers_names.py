"""LoRA files with the names that diffusers and PEFT write, for Stable Diffusion 1.x, 2.x and SDXL, as kohya's.

The weights are the same and only the names differ, but ComfyUI knows just some of the spellings: of today's it takes
0 keys. Read are what ``save_lora_weights`` of any diffusers release writes (``unet.<layer>.lora_A.weight``,
``.lora.down.weight``, ``processor.to_q_lora.down.weight``; ``text_encoder.`` and ``text_encoder_2.`` with
``.lora_linear_layer.down.weight``) and what PEFT itself does (``base_model.model.<layer>.lora_A[.<adapter>].weight``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import SubjectBoothError

ADAPTER_METADATA = "lora_adapter_metadata"
"""In the file's metadata: the PEFT settings, as diffusers 0.34 and newer may write them."""

MAX_ALPHA = 1e9
"""Beyond any that was ever used, and a float32 still holds it times the root of a rank."""

_LAYER_NAME = re.compile(r"(?:(unet|text_encoder|text_encoder_2)\.)?(?:base_model\.model\.)?(.+)")
_UNET_LAYER = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding|class_embedding)\b"
)
_TEXT_ENCODER_LAYER = re.compile(r"(text_model\.|encoder\.layers\.|text_projection\b)")
_KOHYA_PREFIX = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
"""ComfyUI reads ``lora_te1`` for SD 1.x and 2.x as well."""

_TENSOR_ENDINGS = (
    (re.compile(r"\.lora_A(\.[^.]+)?\.weight$"), ".lora_down.weight"),
    (re.compile(r"\.lora_B(\.[^.]+)?\.weight$"), ".lora_up.weight"),
    (re.compile(r"\.lora_B(\.[^.]+)?\.bias$"), ".diff_b"),
    (re.compile(r"([._]lora|\.lora_linear_layer)\.down\.weight$"), ".lora_down.weight"),
    (re.compile(r"([._]lora|\.lora_linear_layer)\.up\.weight$"), ".lora_up.weight"),
    (re.compile(r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$"), ".dora_scale"),
    (re.compile(r"\.(?=(lora_(up|down|mid)\.weight|alpha|dora_scale|(hada|lokr|oft)_\w+|diff|diff_b)$)"), "."),
)
"""How a name ends, and how kohya's does; the last are those that both write alike."""


def with_kohya_names(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    peft_config: str = "",
) -> dict[str, torch.Tensor]:
    """The same file with kohya's names; names of other programs or models stay as they are.

    A layer without an alpha keeps none: to PEFT, diffusers and ComfyUI that is a scale of 1, which is an alpha equal to
    the rank. Where the PEFT settings are there, the layer gets the alpha that they say.

    Args:
        tensors: a LoRA file's.
        metadata: its metadata.
        peft_config: the text of PEFT's ``adapter_config.json``; empty where there is none.

    Raises:
        SubjectBoothError: the settings are no JSON object, or their alpha is no number.
    """
    renamed: dict[str, torch.Tensor] = {}
    layers: dict[str, tuple[str, str]] = {}
    for name, tensor in tensors.items():
        found = _kohya_name(name)
        if found is None or f"{found[0]}{found[1]}" in renamed:
            renamed[name] = tensor
            continue
        layer, kind, *place = found
        renamed[f"{layer}{kind}"] = tensor
        layers[layer] = (place[0], place[1])
    if not layers:
        return renamed
    settings = _settings_by_part(metadata.get(ADAPTER_METADATA, ""), peft_config)
    for layer, (part, path) in layers.items():
        _add_alpha_and_shapes(renamed, layer, path, settings.get(part, {}))
    return renamed


def _kohya_name(name: str) -> tuple[str, str, str, str] | None:
    """Kohya's layer, how its tensor's name ends, the part of the pipeline, diffusers' layer; None for other names."""
    for ending, kind in _TENSOR_ENDINGS:
        match = ending.search(name)
        if match is None:
            continue
        kind = name[match.start() :] if kind == "." else kind
        place = _LAYER_NAME.fullmatch(name[: match.start()])
        if place is None:
            return None
        part, path = place[1], place[2].replace(".processor.", ".")
        if _UNET_LAYER.match(path) and part in (None, "unet"):
            part = "unet"
            path = re.sub(r"\.to_out$", ".to_out.0", path)
        elif _TEXT_ENCODER_LAYER.match(path) and part != "unet":
            part = part or "text_encoder"
            # transformers 5.6 and newer have no text_model; diffusers before 0.18 named the layers as a UNet's.
            path = re.sub(r"^(?=encoder\.)", "text_model.", path)
            path = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", path)
        else:
            return None
        return f"{_KOHYA_PREFIX[part]}_{path.replace('.', '_')}", kind, part, path
    return None


def _settings_by_part(written: str, peft_config: str) -> dict[str, dict[str, Any]]:
    """PEFT's settings by part of the pipeline."""
    flat, alone = (_parse_settings(text) for text in (written, peft_config))
    parts = {
        part: {key.removeprefix(f"{part}."): value for key, value in flat.items() if key.startswith(f"{part}.")}
        for part in _KOHYA_PREFIX
    }
    return {part: values or alone for part, values in parts.items()}


def _parse_settings(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text) if text else {}
        if isinstance(values, dict):
            return values
    except (ValueError, RecursionError):
        pass
    raise SubjectBoothError(
        "PEFT settings that are no JSON object",
        "settings as PEFT writes them",
        "get the file again",
        "adapter_config.json, or the LoRA's own metadata",
    )


def _add_alpha_and_shapes(tensors: dict[str, torch.Tensor], layer: str, path: str, settings: Mapping[str, Any]) -> None:
    """Give a renamed layer its alpha, and the shapes that kohya's files have."""
    down = next(
        (
            tensors[f"{layer}{kind}"]
            for kind in (".lora_down.weight", ".hada_w1_b", ".lokr_w2_b")
            if f"{layer}{kind}" in tensors
        ),
        None,
    )
    alpha = _alpha_of(path, settings)
    if down is not None and down.ndim and len(down) and alpha is not None:
        alpha *= math.sqrt(len(down)) if settings.get("use_rslora") else 1.0
        tensors.setdefault(f"{layer}.alpha", torch.tensor(alpha))
        bias = tensors.get(f"{layer}.diff_b")
        if bias is not None:  # PEFT scales it like the rest, ComfyUI adds it as it is
            tensors[f"{layer}.diff_b"] = bias * (alpha / len(down))
    scale = tensors.get(f"{layer}.dora_scale")
    if scale is not None and scale.ndim == 1 and down is not None:
        tensors[f"{layer}.dora_scale"] = scale.reshape(-1, *[1] * (down.ndim - 1))


def _alpha_of(path: str, settings: Mapping[str, Any]) -> float | None:
    alpha = settings.get("lora_alpha", settings.get("alpha"))  # the latter in LoHa's and LoKr's settings
    patterns = settings.get("alpha_pattern") or {}
    for key, value in patterns.items() if isinstance(patterns, dict) else ():
        # A pattern may be a regular expression; diffusers and PEFT write plain names.
        if f".{path}".endswith(f".{str(key).removeprefix('^').removesuffix('$')}"):
            alpha = value
            break
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= MAX_ALPHA:
        raise SubjectBoothError(
            f"the alpha {str(alpha)[:40]!r} in PEFT settings",
            f"a number up to {MAX_ALPHA:g}",
            "get the file again",
            "adapter_config.json, or the LoRA's own metadata",
        )
    return float(alpha)
