"""Embeddings of images, by which pictures are compared: a protocol, and CLIP, DINOv2 and DINO from a local folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from ..base.sd.tokenizer import END, START, tokenize
from ..errors import SubjectBoothError, require
from ..machine.numerics import CPU

_AT_ONCE = 16
"""Images in one forward pass. ViT-L/14 then takes less than 1 GB."""

_DINOV2_SIDE = 224
_MOST_PIXELS = 2048
"""Along a side: far more than any of these models takes."""
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""By Pillow's number."""

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Embedder(Protocol):
    """Maps images to vectors, so that images with the same content are near each other.

    Attributes:
        name: shown with the figures, since only figures of the same embedder can be compared.
    """

    @property
    def name(self) -> str: ...

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images of any size.

        Args:
            images: float32 [n, 3, h, w] in 0..1.

        Returns:
            unit vectors, float32 [n, d], on the CPU.
        """
        ...


@runtime_checkable
class Namer(Protocol):
    """An embedder that can also tell what an image shows."""

    def names(self, images: torch.Tensor, choices: Sequence[str]) -> list[str]:
        """The choice that fits each image best, or an empty string if none does.

        Args:
            images: float32 [n, 3, h, w] in 0..1.
            choices: prompts, such as "a photo of a dog".
        """
        ...


@dataclass(frozen=True)
class _Kind:
    """A kind of model.

    Attributes:
        label: its name for users.
        model: transformers' class.
        mean: of red, green and blue, for the normalisation; ``std`` likewise.
        margin: pixels by which an image's short side is scaled larger than the crop.
    """

    label: str
    model: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    margin: int = 0


_KINDS = {
    "clip": _Kind("CLIP", "CLIPModel", _CLIP_MEAN, _CLIP_STD),
    "clip_vision_model": _Kind("CLIP", "CLIPVisionModelWithProjection", _CLIP_MEAN, _CLIP_STD),
    "dinov2": _Kind("DINOv2", "Dinov2Model", _IMAGENET_MEAN, _IMAGENET_STD, 32),
    "dinov2_with_registers": _Kind("DINOv2", "Dinov2WithRegistersModel", _IMAGENET_MEAN, _IMAGENET_STD, 32),
    "vit": _Kind("DINO", "ViTModel", _IMAGENET_MEAN, _IMAGENET_STD),
}
"""By ``model_type`` in ``config.json``. ``vit`` is what DINO (arXiv 2104.14294), the one in DreamBooth's
paper, is saved as."""


def from_folder(folder: Path, device: torch.device = CPU) -> Embedder:
    """Load CLIP, DINOv2 or DINO from a local folder as saved by transformers: ``config.json`` and safetensors.

    Nothing is downloaded. CLIP with its text encoder is also a :class:`Namer`; a vision tower alone is not.

    Args:
        folder: the folder. Its ``preprocessor_config.json``, if any, overrides the standard size and normalisation.
        device: where the model runs.

    Raises:
        SubjectBoothError: the folder is missing, incomplete, damaged, or contains another kind of model.
    """
    config = _read_json(folder / "config.json", required=True)
    kind = _KINDS.get(str(config.get("model_type")))
    if kind is None:
        raise _unusable(folder, f"contains a model of type {str(config.get('model_type'))[:60]!r}")
    if not any(folder.glob("*.safetensors")):
        raise _unusable(folder, "contains no .safetensors file")
    require("transformers")
    import transformers

    model_class = getattr(transformers, kind.model)
    # Without a final pooling layer: the weights of DINO have none, and transformers would draw it at random.
    options = {"add_pooling_layer": False} if kind.model == "ViTModel" else {}
    try:
        model, report = model_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # damaged weights or settings can raise anything
        raise _unusable(folder, f"cannot be loaded ({type(error).__name__}: {str(error)[:200]})") from error
    if missing := sorted(report["missing_keys"]):
        raise _unusable(folder, f"lacks {len(missing)} weights, such as {missing[0]!r}")
    model = model.float().eval().requires_grad_(False).to(device)
    preparation = _preparation(kind, model.config, _read_json(folder / "preprocessor_config.json"), folder)
    name = f"{kind.label} {folder.resolve().name}"
    if kind.model == "CLIPModel" and model.config.text_config.vocab_size == END + 1:
        return ClipEmbedder(name, model, preparation)
    return FolderEmbedder(name, model, preparation)


@dataclass(frozen=True)
class Preparation:
    """How images are scaled, cropped and normalised for a model.

    Attributes:
        resize: the short side after scaling, in pixels.
        crop: height and width of the centred crop.
        mean: of red, green and blue, subtracted; ``std``, divided by.
        resampling: mode of :func:`torch.nn.functional.interpolate`.
    """

    resize: int
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resampling: str = "bicubic"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images float32 [n, 3, h, w] in 0..1 -> the model's input."""
        height, width = images.shape[-2:]
        scale = self.resize / min(height, width)
        size = (max(self.crop[0], round(height * scale)), max(self.crop[1], round(width * scale)))
        images = F.interpolate(images, size=size, mode=self.resampling, antialias=True).clamp(0, 1)
        top, left = (size[0] - self.crop[0]) // 2, (size[1] - self.crop[1]) // 2
        images = images[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


class FolderEmbedder:
    """The image side of a model; see :class:`Embedder`.

    Args:
        name: for users.
        model: transformers' model, frozen.
        preparation: of the images.
    """

    def __init__(self, name: str, model: Any, preparation: Preparation) -> None:
        self.name = name
        self._model, self._preparation = model, preparation

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """See :meth:`Embedder.embed`."""
        device = next(self._model.parameters()).device
        parts = [self._features(self._preparation(part.to(device))) for part in images.float().split(_AT_ONCE)]
        return F.normalize(torch.cat(parts).float(), dim=1).cpu()

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """CLIP: the projected image embedding. DINO: the class token after the last norm."""
        if hasattr(self._model, "visual_projection"):
            vision = self._model.vision_model(pixel_values=pixels)
            return self._model.visual_projection(vision.pooler_output)  # type: ignore[no-any-return]
        return self._model(pixel_values=pixels).last_hidden_state[:, 0]  # type: ignore[no-any-return]


class ClipEmbedder(FolderEmbedder):
    """CLIP with its text encoder, which recognises an image by the nearest of several prompts (arXiv 2103.00020)."""

    @torch.no_grad()
    def names(self, images: torch.Tensor, choices: Sequence[str]) -> list[str]:
        """See :meth:`Namer.names`; there is always a nearest one."""
        texts = F.normalize(torch.cat([self._text(choice) for choice in choices]), dim=1)
        return [choices[index] for index in (self.embed(images) @ texts.T).argmax(1).tolist()]

    def _text(self, text: str) -> torch.Tensor:
        length = self._model.config.text_config.max_position_embeddings
        ids = [START, *tokenize(text)[: length - 2], END]
        tokens = torch.tensor([ids], device=next(self._model.parameters()).device)
        pooled = self._model.text_model(input_ids=tokens).pooler_output
        return self._model.text_projection(pooled).float().cpu()  # type: ignore[no-any-return]


def _preparation(kind: _Kind, config: Any, stored: dict[str, Any], folder: Path) -> Preparation:
    """From ``preprocessor_config.json``, where *stored* has a value, otherwise the family's standard."""
    # DINOv2 has positions for 518 pixels, but is used at 224, to which it interpolates them.
    side = _DINOV2_SIDE if kind.label == "DINOv2" else int(getattr(config, "vision_config", config).image_size)
    try:
        scaled = _sides(stored.get("size", side + kind.margin))
        # Without a crop of its own, the stored size is that of the input.
        crop = _sides(stored.get("crop_size", side)) if stored.get("do_center_crop", True) else scaled
        mean = _colour(stored.get("image_mean", kind.mean))
        std = _colour(stored.get("image_std", kind.std))
        resampling = _RESAMPLING[stored.get("resample", 3)]
    except (KeyError, TypeError, ValueError) as error:
        problem = f"has a preprocessor_config.json that cannot be used ({type(error).__name__}: {error})"
        raise _unusable(folder, problem) from error
    return Preparation(max(min(scaled), *crop), crop, mean, std, resampling)


def _sides(stored: Any) -> tuple[int, int]:
    """Height and width of a size as transformers writes it, now or in earlier versions."""
    if isinstance(stored, dict):
        sides = [stored["shortest_edge"]] * 2 if "shortest_edge" in stored else [stored["height"], stored["width"]]
    else:
        sides = [stored, stored]
    if not all(isinstance(side, int) and 1 <= side <= _MOST_PIXELS for side in sides):
        raise ValueError(f"size {stored!r}")
    return sides[0], sides[1]


def _colour(stored: Any) -> tuple[float, ...]:
    red, green, blue = map(float, stored)
    return red, green, blue


def _read_json(path: Path, required: bool = False) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        if not required:
            return {}
        where = "has no config.json" if path.parent.is_dir() else "does not exist"
        raise _unusable(path.parent, where) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(path.parent, f"has an unreadable {path.name} ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise _unusable(path.parent, f"has a {path.name} that is not an object")
    return content


def _unusable(folder: Path, problem: str) -> SubjectBoothError:
    return SubjectBoothError(
        f"the folder of the embedder {problem}",
        "CLIP or DINOv2 as transformers saves it: config.json and safetensors files",
        "download such a model, for example facebook/dinov2-small or openai/clip-vit-base-patch32, and give its folder",
        str(folder),
    )
