"""Builds a diffusers UNet from weights in the LDM layout, and runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...errors import SubjectBoothError, require
from ..conditioning import Conditioning, encoded_text
from ..finite import check_weight
from .layout import LdmLayout

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

LATENT_FACTOR = 8
"""Image pixels per latent pixel, along a side."""


def outline_unet(layout: LdmLayout) -> UNet2DConditionModel:
    """The UNet on the meta device, without weights."""
    require("diffusers")
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**layout.config)


def build_unet(
    layout: LdmLayout, weights: Callable[[], Mapping[str, torch.Tensor]], dtype: torch.dtype
) -> UNet2DConditionModel:
    """A frozen UNet.

    Args:
        layout: layout of the weights.
        weights: returns the weights; called before memory is allocated. They are copied and not kept.
        dtype: dtype of the copies.

    Returns:
        the UNet on the CPU, in eval mode, with ``requires_grad`` off.

    Raises:
        SubjectBoothError: weights are missing, unknown, of a wrong shape or not finite.
    """
    # ComfyUI runs in inference mode, and tensors created in it cannot be used for training.
    with torch.inference_mode(False), torch.no_grad():
        unet = outline_unet(layout)
        names = layout.names
        expected = unet.state_dict()
        missing = sorted(set(expected) - set(names.values()))
        left_over = sorted(set(names.values()) - set(expected))
        if missing or left_over:
            raise SubjectBoothError(
                f"the UNet lacks {len(missing)} weights and has {len(left_over)} unknown ones "
                f"(such as {(missing or left_over)[0]!r})",
                f"the layout of {layout.family.name}",
                "use an unmodified checkpoint",
                layout.where,
            )
        given = weights()
        # Not diffusers' .to(), which warns about casting, although nothing here must stay in fp32.
        torch.nn.Module.to(unet.to_empty(device="cpu"), dtype)
        parameters = dict(unet.named_parameters()) | dict(unet.named_buffers())
        for name, weight in given.items():
            target = parameters[names[name]]
            if target.shape != weight.shape:
                raise SubjectBoothError(
                    f"the UNet's weight {name!r} has shape {tuple(weight.shape)}",
                    f"shape {tuple(target.shape)}",
                    "use an unmodified checkpoint",
                    layout.where,
                )
            target.copy_(weight)
            check_weight(name, target, weight, "UNet", layout.where)
        return unet.requires_grad_(False).eval()


def predict(
    unet: Any, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """The UNet's output (epsilon or v), float32 [b, 4, h/8, w/8].

    Args:
        unet: a ``UNet2DConditionModel``, possibly wrapped by accelerate.
        noisy_latents: [b, 4, h/8, w/8], scaled for the UNet.
        timesteps: int64 [b].
        conditioning: batch size b; with ``pooled`` for SDXL, whose size and crop ids are those used for sampling: the
            image's size, uncropped.
    """
    dtype = next(unet.parameters()).dtype
    text, added = encoded_text(conditioning), None
    if text.pooled is not None:
        height, width = (LATENT_FACTOR * side for side in noisy_latents.shape[2:])
        # [height, width, 0, 0, height, width] for each image, made on the device, as a copy from the host would wait.
        ids = torch.full((len(noisy_latents), 6), height, device=noisy_latents.device)
        ids[:, 1::4] = width
        ids[:, 2:4] = 0
        added = {"text_embeds": text.pooled.to(dtype), "time_ids": ids}
    output = unet(
        noisy_latents.to(dtype),
        timesteps,
        encoder_hidden_states=text.hidden_states.to(dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return output.float()
