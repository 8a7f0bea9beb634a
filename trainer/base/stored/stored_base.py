"""A base model from disk, for runs from a shell. Needs no network, and no configuration files besides the folder's own.

In ComfyUI the base is built from the connected MODEL, CLIP and VAE instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...errors import require
from ...files.digest_memory import digest_of_files
from ...files.storage import sha256_of
from ...machine.numerics import CPU
from ...machine.out_of_memory import free_memory, is_out_of_memory
from ..base_model import BaseModel
from ..conditioning import Conditioning
from ..sd.clip_text import ClipText
from ..sd.denoiser import DiffusersUNet
from ..sd.families import Family, native_resolution
from ..sd.layout import LdmLayout
from ..sd.schedule import make_noise_scheduler
from ..sd.text_encoder import TokenChunks, build_text_encoder, encode
from ..sd.tokenizer import chunks
from .diffusers_folder import read_folder
from .parts import StoredParts
from .single_file import read_file


def load_base(
    path: Path,
    clip_skip: int | None = None,
    prediction_type: str | None = None,
    device: torch.device = CPU,
) -> BaseModel:
    """Read a model of one of the families in :mod:`trainer.base.sd.families`.

    Args:
        path: a .safetensors file in the layout of the original Stable Diffusion releases, or a folder of a diffusers
            pipeline.
        clip_skip: in kohya's counting: 1 takes the text encoder's last layer, 2 the one before; None for the
            family's default.
        prediction_type: ``epsilon`` or ``v_prediction``, for a checkpoint that does not state it; one that does (in a
            folder's scheduler, or by the marks ``v_pred`` and ``ztsnr`` in a file) overrides it. None: epsilon.
        device: where prompts and images are encoded and decoded. Models are on it only while they are in use.

    Raises:
        SubjectBoothError: another format or family, or a missing part.
    """
    parts, layout = _read(path)
    family, where = layout.family, layout.where
    prediction_type = parts.prediction_type or prediction_type or "epsilon"
    clip_layer = None if clip_skip is None else -clip_skip
    digest = _Background(partial(_digest, parts, family, clip_layer, prediction_type))
    require("diffusers", "transformers")  # not earlier: they take seconds to import
    noise_scheduler = make_noise_scheduler(parts.alphas_cumprod, prediction_type)
    text_weights = parts.text_encoders(family, clip_layer)
    codec = parts.codec(family)
    codec.device = device

    def build_text(dtype: torch.dtype) -> list[Any]:
        return [
            build_text_encoder(weights(), shape, dtype, where)
            for weights, shape in zip(text_weights, family.text_encoders, strict=True)
        ]

    return BaseModel(
        family=family.name,
        denoiser=DiffusersUNet(layout, noise_scheduler, lambda: parts.unet),
        prompts=StoredPromptEncoder(lambda: build_text(torch.float32), family, clip_layer, device),
        codec=codec,
        digest=digest.result(),
        text=ClipText(family, clip_layer, lambda prompt: token_chunks(prompt, family), build_text),
    )


def stored_resolution(path: Path, prediction_type: str | None = None) -> int:
    """Side in pixels of the images the model was trained on. Reads only file headers. See :func:`load_base`."""
    parts, layout = _read(path)
    return native_resolution(layout.family, parts.prediction_type or prediction_type or "epsilon")


def _read(path: Path) -> tuple[StoredParts, LdmLayout]:
    parts = read_folder(path) if path.is_dir() else read_file(path)
    return parts, LdmLayout.of(parts.unet.shapes, str(path), parts.unet.dtypes)


class StoredPromptEncoder:
    """Encodes prompts with transformers. Prompts are literal: ``(word:1.2)`` is ComfyUI's syntax, not CLIP's.

    The text encoders are built for each call and released after it: prompts are encoded once in a run, and SDXL's
    would take 3.3 GB next to the UNet for the rest of it.
    """

    def __init__(
        self,
        build: Callable[[], list[Any]],
        family: Family,
        clip_layer: int | None,
        device: torch.device = CPU,
    ) -> None:
        self._build, self._family, self._clip_layer, self._device = build, family, clip_layer, device

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """See :class:`trainer.base.conditioning.PromptEncoder`."""
        models = self._build()
        if self._device != CPU:
            try:
                return self._encode([model.to(self._device) for model in models], prompts)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            models = [model.to(CPU) for model in models]  # outside the handler, which keeps tensors alive
            free_memory(self._device)
        return self._encode(models, prompts)

    def _encode(self, models: list[Any], prompts: Sequence[str]) -> list[Conditioning]:
        with torch.no_grad():
            chunks = [token_chunks(prompt, self._family) for prompt in prompts]
            encoded = encode(models, self._family.text_encoders, chunks, self._clip_layer)
            return [conditioning.to(CPU) for conditioning in encoded]


def token_chunks(prompt: str, family: Family) -> tuple[TokenChunks, ...]:
    """A prompt's chunks for each text encoder of the family, with weights of 1."""
    ids = [chunks(prompt, shape.padding) for shape in family.text_encoders]
    return tuple(TokenChunks(rows, torch.ones(rows.shape)) for rows in ids)


class _Background:
    """Computes a value in another thread: files are hashed while packages are imported.

    The thread is a daemon, so that an error in the meantime ends the program without waiting for it.
    """

    def __init__(self, compute: Callable[[], str]) -> None:
        self._compute = compute
        self._value: str | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._compute()
        except BaseException as error:  # raised again where the value is needed
            self._error = error

    def result(self) -> str:
        """Wait for the value.

        Raises:
            BaseException: what computing it has raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._value is not None
        return self._value


def _digest(parts: StoredParts, family: Family, clip_layer: int | None, prediction_type: str) -> str:
    # The usual scale is left out, so that a folder and a file of the same model have the same digest.
    unusual = parts.latent_scale not in (None, family.latent_scale)
    scale = (f"latent scale {parts.latent_scale}",) if unusual else ()
    others = (parts.alphas_cumprod, f"clip layer {clip_layer}", prediction_type, *scale)
    return digest_of_files(parts.files, sha256_of(*others), lambda: sha256_of(*parts.files, *others))
