"""Base models with random weights at full size, or small ones of the same layout, without a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from subjectbooth.scripts import full_size
from subjectbooth.tests.small_base import MadeUNet
from subjectbooth.trainer.base.base_model import BaseModel
from subjectbooth.trainer.base.sd.clip_text import ClipText
from subjectbooth.trainer.base.sd.codecs import KLCodec
from subjectbooth.trainer.base.sd.families import SD1, SDXL, Family
from subjectbooth.trainer.base.sd.layout import LdmLayout
from subjectbooth.trainer.base.sd.schedule import make_noise_scheduler
from subjectbooth.trainer.base.sd.text_encoder import build_text_encoder
from subjectbooth.trainer.base.stored.parts import stable_diffusion_schedule
from subjectbooth.trainer.base.stored.stored_base import StoredPromptEncoder, token_chunks

Fill = Callable[[torch.Size], torch.Tensor]
"""A weight of that shape, on the CPU; called for one weight after the other."""

FAMILIES = {"sd1": SD1, "sdxl": SDXL}
_SMALL_TEXT = dataclasses.replace(SD1.text_encoders[0], width=64, layers=2, heads=4)
SMALL = dataclasses.replace(SD1, context_dim=64, text_encoders=(_SMALL_TEXT,))
_SMALL_UNET = {
    "block_out_channels": (32, 64),
    "cross_attention_dim": 64,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def random_base(name: str, filling: Callable[[], Fill], small: bool = False) -> BaseModel:
    """The base of a family, everything in it made when it is asked for.

    Args:
        name: ``sd1`` or ``sdxl``.
        filling: gives what makes the weights of one module, the same for each module of one layout.
        small: some thousand weights in SD 1.5's layout, for a CPU.
    """
    family = SMALL if small else FAMILIES[name]

    def build_unet(dtype: torch.dtype) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            with torch.device("meta"):
                unet = full_size.unet(name, **(_SMALL_UNET if small else {}))
            torch.nn.Module.to(unet.to_empty(device="cpu"), dtype)
            fill = filling()
            for tensor in unet.state_dict().values():
                tensor.copy_(fill(tensor.shape))
            return unet.requires_grad_(False).eval()

    def build_text(dtype: torch.dtype) -> list[Any]:
        return [
            build_text_encoder(_Filled(filling(), _text_shapes(family, number)), shape, dtype, "random weights")
            for number, shape in enumerate(family.text_encoders)
        ]

    with torch.device("meta"):
        vae = full_size.vae(**({"block_out_channels": (32, 32, 32, 32)} if small else {}))
    weights = _Filled(filling(), {key: tensor.shape for key, tensor in vae.state_dict().items()})
    # Without a file there are no names of a file's layers: those of diffusers stay.
    layout = LdmLayout(dataclasses.replace(family, kohya_ldm_names=False), {}, {}, {}, "random weights")
    return BaseModel(
        family=family.name,
        denoiser=MadeUNet(layout, make_noise_scheduler(stable_diffusion_schedule(), "epsilon"), dict, build_unet),
        prompts=StoredPromptEncoder(lambda: build_text(torch.float32), family, None),
        codec=KLCodec(dict(weights.items()), family.latent_scale, "random weights"),
        digest=f"random {name} {small}",
        text=ClipText(family, None, lambda prompt: token_chunks(prompt, family), build_text),
    )


class _Filled(dict[str, torch.Tensor]):
    """Weights by name, each made when it is read."""

    def __init__(self, fill: Fill, shapes: dict[str, torch.Size]) -> None:
        super().__init__()
        self._fill, self._shapes = fill, shapes

    def get(self, name: str, default: Any = None) -> Any:
        return self._fill(self._shapes[name]) if name in self._shapes else default

    def items(self) -> Any:
        return [(name, self._fill(shape)) for name, shape in self._shapes.items()]


def _text_shapes(family: Family, number: int) -> dict[str, torch.Size]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shape = family.text_encoders[number]
    config = CLIPTextConfig(
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        projection_dim=shape.width,
        vocab_size=49408,
    )
    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if shape.projects else CLIPTextModel)(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def random_weights(device: torch.device) -> Fill:
    """Normal weights of a size with which nothing saturates; made on the device, which is faster."""
    generator = torch.Generator(device).manual_seed(0)

    def fill(shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            # Norms' weights and all biases look alike here: a constant suits both.
            return torch.full(shape, 0.5)
        spread = 0.7 / shape[1:].numel() ** 0.5
        return (torch.randn(shape, generator=generator, device=device) * spread).cpu()

    return fill
