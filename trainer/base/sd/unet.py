"""A diffusers UNet out of weights in the LDM layout, and what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...errors import SubjectBoothError, require
from ..conditioning import Conditioning
from ..finite import check_weight
from .layout import LdmLayout

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

LATENT_FACTOR = 8
"""Pixels a side of one latent."""


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
        layout: of the weights.
        weights: gives the weights when called, before memory is taken for the copies; they are copied, never kept.
        dtype: what the weights are kept in.

    Returns:
        The UNet on the CPU, in eval mode, with ``requires_grad`` off everywhere.

    Raises:
        SubjectBoothError: weights are missing or left over, have other shapes than the layout says, or are not numbers.
    """
    # Inside ComfyUI everything runs in inference mode, and tensors made there can never take part in training.
    with torch.inference_mode(False), torch.no_grad():
        unet = outline_unet(layout)
        names = layout.names
        expected = unet.state_dict()
        missing = sorted(set(expected) - set(names.values()))
        left_over = sorted(set(names.values()) - set(expected))
        if missing or left_over:
            raise SubjectBoothError(
                f"a UNet with {len(missing)} weights missing and {len(left_over)} unknown "
                f"(such as {(missing or left_over)[0]!r})",
                f"the layout of {layout.family.name}",
                "use an unmodified checkpoint",
                layout.where,
            )
        given = weights()
        # torch's own .to(): diffusers' warns about casting although nothing is to stay in fp32 here.
        torch.nn.Module.to(unet.to_empty(device="cpu"), dtype)
        parameters = dict(unet.named_parameters()) | dict(unet.named_buffers())
        for name, weight in given.items():
            target = parameters[names[name]]
            if target.shape != weight.shape:
                raise SubjectBoothError(
                    f"the weight {name!r} of shape {tuple(weight.shape)}",
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
    """The UNet's raw output (epsilon or v), float32 [b, 4, h/8, w/8].

    Args:
        unet: a ``UNet2DConditionModel``, perhaps wrapped by accelerate.
        noisy_latents: [b, 4, h/8, w/8], in the training space.
        timesteps: int64 [b].
        conditioning: batch of b prompts; with ``pooled`` for families that take it (SDXL), whose size and crop ids are
            then those that the sampler uses: the picture's own size, uncropped.
    """
    dtype = next(unet.parameters()).dtype
    added = None
    if conditioning.pooled is not None:
        height, width = (LATENT_FACTOR * side for side in noisy_latents.shape[2:])
        ids = torch.tensor([[height, width, 0, 0, height, width]], device=noisy_latents.device)
        added = {"text_embeds": conditioning.pooled.to(dtype), "time_ids": ids.repeat(len(noisy_latents), 1)}
    output = unet(
        noisy_latents.to(dtype),
        timesteps,
        encoder_hidden_states=conditioning.hidden_states.to(dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return output.float()
