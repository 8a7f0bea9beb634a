"""The narrow model from the compact weights, equivalent to the checkpoint; for evaluation and tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..base import WEIGHTS, read_packed
from ..expand import narrow_state
from .autoencoder import decoder_widths, encoder_widths, make_decoder, make_encoder
from .text import TextEncoder
from .unet import UNet


@dataclass(frozen=True)
class Narrow:
    """The four nets, fp32, in eval mode."""

    unet: UNet
    text: TextEncoder
    encoder: nn.Sequential
    decoder: nn.Sequential


def _under(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def load_narrow(path: Path = WEIGHTS) -> Narrow:
    """Build the nets and load their weights, which also give the autoencoder's widths."""
    state = narrow_state(read_packed(path))
    text = TextEncoder(state["text.vocabulary"].tolist())
    encoder = make_encoder(encoder_widths(_under(state, "vae.encoder.")))
    decoder = make_decoder(decoder_widths(_under(state, "vae.decoder.")))
    parts = Narrow(UNet(), text, encoder, decoder)
    prefixes = {"unet.": parts.unet, "text.": text, "vae.encoder.": encoder, "vae.decoder.": decoder}
    for prefix, net in prefixes.items():
        net.load_state_dict(_under(state, prefix))
        net.eval().requires_grad_(False)
    return parts
