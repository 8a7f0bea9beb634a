"""Converts the key names of diffusers and PEFT LoRA files to kohya's, for Stable Diffusion 1.x, 2.x and SDXL.

Only the names differ, not the weights, but ComfyUI supports just some of the variants; of those that diffusers writes
today it loads no key. Supported are the formats of ``save_lora_weights`` of any diffusers release
(``unet.<layer>.lora_A.weight``, ``.lora.down.weight``, ``processor.to_q_lora.down.weight``; ``text_encoder.`` and
``text_encoder_2.`` with ``.lora_linear_layer.down.weight``) and PEFT's own
(``base_model.model.<layer>.lora_A[.<adapter>].weight``).
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
"""Metadata key of the PEFT settings, which diffusers 0.34 and newer may write."""

MAX_ALPHA = 1e9
"""Larger than any alpha in use, and multiplied by the square root of a rank it still fits into float32."""

_LAYER_NAME = re.compile(r"(?:(unet|text_encoder|text_encoder_2)\.)?(?:base_model\.model\.)?(.+)")
_UNET_LAYER = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding|class_embedding)\b"
)
_TEXT_ENCODER_LAYER = re.compile(r"(text_model\.|encoder\.layers\.|text_projection\b)")
_KOHYA_PREFIX = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
"""ComfyUI also accepts ``lora_te1`` for SD 1.x and 2.x."""

_TENSOR_ENDINGS = (
    (re.compile(r"\.lora_A(\.[^.]+)?\.weight$"), ".lora_down.weight"),
    (re.compile(r"\.lora_B(\.[^.]+)?\.weight$"), ".lora_up.weight"),
    (re.compile(r"\.lora_B(\.[^.]+)?\.bias$"), ".diff_b"),
    (re.compile(r"([._]lora|\.lora_linear_layer)\.down\.weight$"), ".lora_down.weight"),
    (re.compile(r"([._]lora|\.lora_linear_layer)\.up\.weight$"), ".lora_up.weight"),
    (re.compile(r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$"), ".dora_scale"),
    (re.compile(r"\.(?=(lora_(up|down|mid)\.weight|alpha|dora_scale|(hada|lokr|oft)_\w+|diff|diff_b)$)"), "."),
)
"""Ending of a tensor name, and kohya's ending for it; the last pattern matches endings that are the same in both."""


def with_kohya_names(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    peft_config: str = "",
) -> dict[str, torch.Tensor]:
    """Rename the tensors to kohya's names. Names of other programs or models are left unchanged.

    Layers get the alpha from the PEFT settings, if there are any. Otherwise a layer without an alpha stays without one:
    PEFT, diffusers and ComfyUI then use a scale of 1.

    Args:
        tensors: the tensors of a LoRA file.
        metadata: its metadata.
        peft_config: the text of PEFT's ``adapter_config.json``; empty if there is none.

    Raises:
        SubjectBoothError: the settings are not a JSON object, or their alpha is not a valid number.
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
    """Kohya's layer name and tensor ending, the pipeline component, and diffusers' layer name; None for other names."""
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
            # transformers 5.6 and newer omit text_model; diffusers before 0.18 used the UNet's layer names.
            path = re.sub(r"^(?=encoder\.)", "text_model.", path)
            path = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", path)
        else:
            return None
        return f"{_KOHYA_PREFIX[part]}_{path.replace('.', '_')}", kind, part, path
    return None


def _settings_by_part(written: str, peft_config: str) -> dict[str, dict[str, Any]]:
    """PEFT's settings by pipeline component."""
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
        "the PEFT settings are not a JSON object",
        "settings as written by PEFT",
        "download the file again",
        "adapter_config.json, or the LoRA's own metadata",
    )


def _add_alpha_and_shapes(tensors: dict[str, torch.Tensor], layer: str, path: str, settings: Mapping[str, Any]) -> None:
    """Add the alpha to a renamed layer, and convert its tensors to kohya's shapes and scale."""
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
        if bias is not None:  # PEFT scales the bias like the weights; ComfyUI adds it unscaled
            tensors[f"{layer}.diff_b"] = bias * (alpha / len(down))
    scale = tensors.get(f"{layer}.dora_scale")
    if scale is not None and scale.ndim == 1 and down is not None:
        tensors[f"{layer}.dora_scale"] = scale.reshape(-1, *[1] * (down.ndim - 1))


def _alpha_of(path: str, settings: Mapping[str, Any]) -> float | None:
    alpha = settings.get("lora_alpha", settings.get("alpha"))  # "alpha" for LoHa and LoKr
    patterns = settings.get("alpha_pattern") or {}
    for key, value in patterns.items() if isinstance(patterns, dict) else ():
        # PEFT allows regular expressions here, but diffusers and PEFT themselves write plain names.
        if f".{path}".endswith(f".{str(key).removeprefix('^').removesuffix('$')}"):
            alpha = value
            break
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= MAX_ALPHA:
        raise SubjectBoothError(
            f"the alpha {str(alpha)[:40]!r} in the PEFT settings is invalid",
            f"a number up to {MAX_ALPHA:g}",
            "download the file again",
            "adapter_config.json, or the LoRA's own metadata",
        )
    return float(alpha)
