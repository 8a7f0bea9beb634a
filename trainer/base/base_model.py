"""The frozen base that an adapter is trained on: a denoiser, what encodes prompts, and what encodes pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .conditioning import LatentCodec, PromptEncoder
from .denoiser import Denoiser
from .trainable_text import TrainableText


@dataclass
class BaseModel:
    """A base model in the parts that training needs.

    Attributes:
        family: the name that users know it by ("SD 1.x").
        denoiser: the network and its noise.
        prompts: encodes prompts with the model's own text encoder(s).
        codec: encodes and decodes pictures with the model's own VAE.
        digest: SHA-256 over all of the above, part of a run's key.
        text: its text encoders as something to train; None where they can only stay frozen.
        prompt_of: a caption as a prompt of the encoder's own syntax that means the caption's text, letter by letter.
        sampling_digest: like ``digest``, over what class images are drawn by; empty where that is the same.
    """

    family: str
    denoiser: Denoiser
    prompts: PromptEncoder
    codec: LatentCodec
    digest: str
    text: TrainableText | None = None
    prompt_of: Callable[[str], str] = str
    sampling_digest: str = ""
