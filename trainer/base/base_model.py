"""The frozen base that a LoRA is trained on: denoiser, prompt encoder and latent codec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config import AUTO, TrainConfig
from .conditioning import LatentCodec, PromptEncoder
from .denoiser import Denoiser
from .trainable_text import TrainableText


@dataclass
class BaseModel:
    """The parts of a base model that training needs.

    Attributes:
        family: the name that users know it by ("SD 1.x").
        denoiser: the network and its noise process.
        prompts: encodes prompts with the model's text encoders.
        codec: encodes and decodes images with the model's VAE.
        digest: SHA-256 of all of the above; part of a run's key.
        text: the trainable text encoders; None if they must stay frozen.
        prompt_of: escapes a caption, so that the encoder's prompt syntax reads it literally.
        note: what the user should know about this base; empty for nothing.
        sampling_digest: SHA-256 of the parts that affect class images; empty if that is ``digest``.
    """

    family: str
    denoiser: Denoiser
    prompts: PromptEncoder
    codec: LatentCodec
    digest: str
    text: TrainableText | None = None
    prompt_of: Callable[[str], str] = str
    sampling_digest: str = ""
    note: str = ""

    def with_times_of(self, config: TrainConfig) -> BaseModel:
        """The same base, trained at the times that the settings ask for.

        Raises:
            SubjectBoothError: its noise process has no such choice.
        """
        sampling, shift = config.timestep_sampling, config.timestep_shift
        if sampling == AUTO and not shift:
            return self
        return replace(self, denoiser=self.denoiser.with_times(sampling, shift))
