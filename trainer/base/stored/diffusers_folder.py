"""Reads a folder of a diffusers pipeline: unet/, text_encoder/, text_encoder_2/, vae/ and scheduler/.

Only safetensors and JSON are read. The tokenizer is not: all supported families use CLIP's, which the pack has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...errors import SubjectBoothError
from ..sd.codecs import KLCodec, TinyCodec
from ..sd.families import Family, TextEncoderShape
from ..sd.ldm_unet import ldm_names
from ..sd.text_encoder import lacks_last_layer, refuse_missing_last_layer, transformers_name, with_last_layer
from .parts import (
    StoredParts,
    WeightsReader,
    missing_part,
    scaled_linear_betas,
    stable_diffusion_schedule,
)
from .tensors import StoredTensors

_TEXT_FOLDERS = ("text_encoder", "text_encoder_2")
# File names of diffusers and transformers, with ".fp16" before the extension in half precision.
_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".fp16", ".bf16", ".non_ema")


def read_folder(path: Path) -> StoredParts:
    """The parts of a pipeline's folder. Reads only file headers and small JSON files.

    Raises:
        SubjectBoothError: not a pipeline's folder, an unsupported pipeline, pickled weights, or a missing part.
    """
    where = str(path)
    if not (path / "unet").is_dir():
        raise _not_a_pipeline(path)
    _refuse_other_kinds(path)
    unet, files = _weights(path / "unet")
    names = ldm_names(unet)
    text = [_weights(path / folder) for folder in _TEXT_FOLDERS if (path / folder).is_dir()]
    if not (path / "vae").is_dir():
        raise missing_part("VAE", where)
    vae, vae_files = _weights(path / "vae")
    scheduler, vae_config = _json(path / "scheduler" / "scheduler_config.json"), _json(path / "vae" / "config.json")
    tiny = vae_config.get("_class_name") == "AutoencoderTiny"
    latent_scale = None if tiny or "scaling_factor" not in vae_config else float(vae_config["scaling_factor"])

    def codec(family: Family) -> TinyCodec | KLCodec:
        if tiny:
            return TinyCodec(vae, str(path / "vae"))
        return KLCodec(vae, family.latent_scale if latent_scale is None else latent_scale, str(path / "vae"))

    def text_encoders(family: Family, clip_layer: int | None) -> list[WeightsReader]:
        if len(text) < len(family.text_encoders):
            raise missing_part("text encoder", where)
        found = list(zip((stored for stored, _ in text), family.text_encoders, strict=False))
        if any(lacks_last_layer(map(transformers_name, stored), shape) for stored, shape in found):
            refuse_missing_last_layer(clip_layer, where)
        return [partial(_text_weights, stored, shape) for stored, shape in found]

    return StoredParts(
        files=(*files, *(file for _, more in text for file in more), *vae_files),
        unet=unet.renamed(names.__getitem__),
        text_encoders=text_encoders,
        codec=codec,
        prediction_type=scheduler.get("prediction_type"),
        alphas_cumprod=_schedule(scheduler, where),
        latent_scale=latent_scale,
    )


def _not_a_pipeline(path: Path) -> SubjectBoothError:
    if (path / "transformer").is_dir():
        kind = str(_json(path / "model_index.json").get("_class_name", "a pipeline with a transformer"))
        return SubjectBoothError(
            f"the folder holds a {kind} (such as Flux or SD 3)",
            "a Stable Diffusion pipeline",
            "use an SD 1.x, SD 2.x or SDXL model",
            str(path),
        )
    return SubjectBoothError(
        "the folder has no unet/",
        "a pipeline saved by diffusers, or a .safetensors file",
        "check the path",
        str(path),
    )


def _refuse_other_kinds(path: Path) -> None:
    """Reject models whose weights look like a Stable Diffusion UNet, but whose configuration says otherwise."""
    scheduler = str(_json(path / "scheduler" / "scheduler_config.json").get("_class_name", ""))
    if scheduler.startswith(("EDM", "FlowMatch")):
        raise SubjectBoothError(
            f"the model samples with {scheduler}",
            "one that predicts epsilon or v",
            "use an SD 1.x, SD 2.x or SDXL model",
            str(path),
        )
    unet = _json(path / "unet" / "config.json")
    kind = unet.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise SubjectBoothError(
            f"the UNet is a {kind}", "UNet2DConditionModel", "use an SD 1.x, SD 2.x or SDXL model", str(path)
        )


def _weights(folder: Path) -> tuple[StoredTensors, tuple[Path, ...]]:
    """The weights of one part, and their files; full precision is preferred to half."""
    for variant in _VARIANTS:
        for stem in _STEMS:
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return StoredTensors.open([single]), (single,)
            for index in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json"):
                if (folder / index).is_file():
                    files = _shards(folder / index)
                    return StoredTensors.open(files), files
    pickled = next((file for ending in (".bin", ".ckpt", ".pt") for file in sorted(folder.glob(f"*{ending}"))), None)
    if pickled is not None:
        raise SubjectBoothError(
            f"the weights are in {pickled.name}",
            "a .safetensors file",
            "save the pipeline with safe_serialization=True; pickled files are never opened",
            str(folder),
        )
    raise SubjectBoothError(
        "the folder has no weights", "a .safetensors file in it", "get the model again", str(folder)
    )


def _shards(index: Path) -> tuple[Path, ...]:
    names = sorted(set(_json(index).get("weight_map", {}).values()))
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if not names or outside:
        raise SubjectBoothError(
            "the index does not list files next to it",
            "an index written by diffusers",
            "get the model again",
            str(index),
        )
    return tuple(index.parent / name for name in names)


def _text_weights(stored: StoredTensors, shape: TextEncoderShape) -> dict[str, torch.Tensor]:
    return with_last_layer({transformers_name(name): tensor for name, tensor in stored.items()}, shape)


def _schedule(config: Mapping[str, Any], where: str) -> torch.Tensor:
    """``alphas_cumprod`` of the folder's scheduler.

    Raises:
        SubjectBoothError: an unknown beta schedule.
    """
    timesteps = int(config.get("num_train_timesteps", 1000))
    first, last = float(config.get("beta_start", 0.00085)), float(config.get("beta_end", 0.012))
    kind = config.get("beta_schedule", "scaled_linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = scaled_linear_betas(first, last, timesteps)
    elif kind == "linear":
        betas = torch.linspace(first, last, timesteps, dtype=torch.float64)
    else:
        raise SubjectBoothError(
            f"the noise schedule is {str(kind)[:40]!r}",
            "scaled_linear or linear",
            "use an unmodified Stable Diffusion model",
            where,
        )
    return stable_diffusion_schedule(bool(config.get("rescale_betas_zero_snr")), betas)


def _json(path: Path) -> dict[str, Any]:
    """The content of a small configuration file; empty if there is none.

    Raises:
        SubjectBoothError: not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SubjectBoothError(
            "the configuration is not JSON", "a configuration written by diffusers", "get the model again", str(path)
        )
    return found
