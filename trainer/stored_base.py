"""A base model from the disk, for runs from a shell: no network, no configuration files but those beside the weights.

Inside ComfyUI the base comes from the wired MODEL, CLIP and VAE instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .base_model import (
    BaseModel,
    build_unet,
    inspect_unet,
    lora_layer_names,
    make_noise_scheduler,
    outline_unet,
)
from .codecs import KLCodec, TinyCodec
from .conditioning import Conditioning
from .errors import SubjectBoothError, require
from .families import Family, native_resolution
from .memory import free_memory, is_out_of_memory
from .numerics import CPU
from .storage import sha256_of
from .stored_tensors import StoredTensors
from .text_encoder import TokenChunks, build_text_encoder, encode
from .tokenizer import chunks

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


WeightsReader = Callable[[], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class StoredParts:
    """What a checkpoint file or a diffusers folder holds, in the names that the trainer works with.

    Attributes:
        files: everything that decides what the base is.
        unet: in the layout of single files, without the prefix.
        text_encoders: for a family and a layer to take (ComfyUI's count), what reads each text encoder's weights, with
            transformers' names (``text_model.encoder...``).
        codec: makes the latent codec.
        prediction_type: what the checkpoint says of itself; None when it says nothing.
        alphas_cumprod: the noise schedule.
        latent_scale: of the codec, where the checkpoint says it itself.
    """

    files: tuple[Path, ...]
    unet: StoredTensors
    text_encoders: Callable[[Family, int | None], list[WeightsReader]]
    codec: Callable[[Family], TinyCodec | KLCodec]
    prediction_type: str | None
    alphas_cumprod: torch.Tensor
    latent_scale: float | None = None


def load_base(
    path: Path, clip_skip: int | None = None, prediction_type: str | None = None,
    device: torch.device = CPU,
) -> BaseModel:
    """Read a model of one of the families in :mod:`trainer.families`.

    Args:
        path: a .safetensors file in the layout of the original Stable Diffusion release, or a folder as diffusers
            saves pipelines.
        clip_skip: kohya's count: 1 takes the text encoder's last layer, 2 the one before; None the family's own.
        prediction_type: ``epsilon`` or ``v_prediction``, for a checkpoint that does not say so itself; one that does
            (a folder's scheduler, the marks ``v_pred`` and ``ztsnr`` in a file) is believed. None: epsilon.
        device: where prompts and pictures are encoded, and pictures decoded. Only meanwhile is anything there.

    Raises:
        SubjectBoothError: it is of another format or family, or parts are missing.
    """
    parts, family = _read(path)
    where = str(path)
    shapes = parts.unet.shapes
    require("diffusers", "transformers")  # not before: they take seconds to import, and a mistyped path none to refuse
    prediction_type = parts.prediction_type or prediction_type or "epsilon"
    noise_scheduler = make_noise_scheduler(parts.alphas_cumprod, prediction_type)
    clip_layer = None if clip_skip is None else -clip_skip
    text_weights = parts.text_encoders(family, clip_layer)
    codec = parts.codec(family)
    codec.device = device

    def build(dtype: torch.dtype) -> UNet2DConditionModel:
        return build_unet(shapes, lambda: parts.unet, family, dtype, where)

    def build_text(dtype: torch.dtype) -> list[Any]:
        return [build_text_encoder(weights(), shape, dtype, where)
                for weights, shape in zip(text_weights, family.text_encoders, strict=True)]

    return BaseModel(
        family=family,
        noise_scheduler=noise_scheduler,
        prompts=StoredPromptEncoder(lambda: build_text(torch.float32), family, clip_layer, device),
        codec=codec,
        digest=_digest(parts, family, clip_layer, prediction_type),
        build_unet=build,
        layer_names=lora_layer_names(shapes, family),
        clip_layer=clip_layer,
        tokenize=lambda prompt: token_chunks(prompt, family),
        build_text_encoders=build_text,
        outline_unet=lambda: outline_unet(shapes, family, where))


def stored_resolution(path: Path, prediction_type: str | None = None) -> int:
    """Pixels a side that the model was trained at, from the files' headers alone. See :func:`load_base`."""
    parts, family = _read(path)
    return native_resolution(family, parts.prediction_type or prediction_type or "epsilon")


def _read(path: Path) -> tuple[StoredParts, Family]:
    from .diffusers_folder import read_folder
    from .single_file import read_file

    parts = read_folder(path) if path.is_dir() else read_file(path)
    return parts, inspect_unet(parts.unet.shapes, str(path), parts.unet.dtypes)


class StoredPromptEncoder:
    """Encodes prompts with transformers. Text is taken literally: ``(word:1.2)`` is ComfyUI's syntax, not CLIP's.

    The text encoders are built for each call and dropped after it: prompts are encoded once in a run, and SDXL's
    would take 3.3 GB beside the UNet for the rest of it.
    """

    def __init__(
        self, build: Callable[[], list[Any]], family: Family, clip_layer: int | None,
        device: torch.device = CPU,
    ) -> None:
        self._build, self._family, self._clip_layer, self._device = build, family, clip_layer, device

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """See :class:`trainer.conditioning.PromptEncoder`."""
        models = self._build()
        if self._device != CPU:
            try:
                return self._encode([model.to(self._device) for model in models], prompts)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            models = [model.to(CPU) for model in models]  # outside the handler: until here the failed attempt is alive
            free_memory(self._device)
        return self._encode(models, prompts)

    def _encode(self, models: list[Any], prompts: Sequence[str]) -> list[Conditioning]:
        with torch.no_grad():
            chunks = [token_chunks(prompt, self._family) for prompt in prompts]
            encoded = encode(models, self._family.text_encoders, chunks, self._clip_layer)
            return [conditioning.to(CPU) for conditioning in encoded]


def token_chunks(prompt: str, family: Family) -> tuple[TokenChunks, ...]:
    """A prompt's chunks for each text encoder of the family, all at weight 1."""
    ids = [chunks(prompt, shape.padding) for shape in family.text_encoders]
    return tuple(TokenChunks(rows, torch.ones(rows.shape)) for rows in ids)


def missing_part(name: str, where: str) -> SubjectBoothError:
    """What to say of a checkpoint without a text encoder or a VAE."""
    return SubjectBoothError(f"a checkpoint without a {name}", "a whole checkpoint",
                             "use one that was saved with all its parts", where)


def stable_diffusion_schedule(
    zero_terminal_snr: bool = False, betas: torch.Tensor | None = None,
) -> torch.Tensor:
    """``alphas_cumprod``, float32 [timesteps].

    Args:
        zero_terminal_snr: rescale so that the last step is pure noise (arXiv 2305.08891, algorithm 1), but for the
            small remainder that ComfyUI leaves too.
        betas: float64 [timesteps]; None for Stable Diffusion's own, from 0.00085 to 0.012, linear in their square
            root.
    """
    if betas is None:
        betas = scaled_linear_betas(0.00085, 0.012, 1000)
    alphas = torch.cumprod(1.0 - betas, dim=0)
    if zero_terminal_snr:
        root = alphas.sqrt()
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas[-1] = 4.8973451890853435e-08
    return alphas.float()


def scaled_linear_betas(first: float, last: float, timesteps: int) -> torch.Tensor:
    """float64 [timesteps], linear in their square root."""
    return torch.linspace(first**0.5, last**0.5, timesteps, dtype=torch.float64) ** 2


def _digest(parts: StoredParts, family: Family, clip_layer: int | None, prediction_type: str) -> str:
    # The usual scale is left out, so that a folder and a file of one model, and runs of before, have one digest.
    unusual = parts.latent_scale not in (None, family.latent_scale)
    scale = (f"latent scale {parts.latent_scale}",) if unusual else ()
    return sha256_of(*parts.files, parts.alphas_cumprod, f"clip layer {clip_layer}", prediction_type, *scale)
