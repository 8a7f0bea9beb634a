"""Pictures of many prompts by one MODEL and CLIP, kept on the disk like class images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from PIL import Image

from ..trainer.preserve.priors import PriorRecipe, PriorStore, batches_to_make, make_missing
from .bridge import ComfyLatentCodec, latent_factor
from .host import stop_if_cancelled
from .sampling import BATCH_INDEPENDENT, PictureSampler

StepReport = Callable[[float, Image.Image | None], None]
"""Called after each denoising step with the number of finished pictures, the one in progress counted in part."""


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn, other than by which model.

    Attributes:
        side: pixels, a multiple of 8.
        sampler_name, scheduler, steps, cfg, seed: as in KSampler; picture i of every prompt has the seed ``seed + i``.
        batch_size: pictures per batch.
    """

    side: int
    sampler_name: str
    scheduler: str
    steps: int
    cfg: float
    seed: int
    batch_size: int


class PromptPictures:
    """Draws the pictures of each prompt, or reads those that exist.

    The text encoder encodes all prompts at first use, so that it and the UNet are loaded in turn only once.

    Args:
        model, clip, vae: what draws.
        prompts: all prompts that will be asked for.
        drawing: how.
        digest: SHA-256 of everything in the model and text encoder that affects a picture.
        root: the folder for the pictures' latents, one folder for each prompt.
        same_text: pictures by another model whose text encoder is the same; their encoded prompts are used.
    """

    def __init__(
        self,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        prompts: Sequence[str],
        drawing: Drawing,
        digest: str,
        root: Path,
        same_text: PromptPictures | None = None,
    ) -> None:
        self._model, self._clip, self._prompts, self._drawing = model, clip, prompts, drawing
        self._codec, self._latent_factor = ComfyLatentCodec(model, vae), latent_factor(vae)
        self._recipe = PriorRecipe(
            base_digest=digest,
            prompt="",
            negative="",
            width=drawing.side,
            height=drawing.side,
            sampler_name=drawing.sampler_name,
            scheduler=drawing.scheduler,
            steps=drawing.steps,
            cfg=drawing.cfg,
            seed=drawing.seed,
            grouping=0 if drawing.sampler_name in BATCH_INDEPENDENT else drawing.batch_size,
        )
        self._root, self._same_text = root, same_text

    def missing(self, prompt: str, count: int) -> int:
        """How many of a prompt's first ``count`` pictures have to be drawn; draws and loads nothing."""
        found, _ = self._store(prompt).load()
        return sum(len(batch) for batch in self._batches(found, count))

    def draw(self, prompt: str, count: int, on_step: StepReport) -> torch.Tensor:
        """The first ``count`` pictures of a prompt, float32 [count, 3, side, side] in 0..1 on the CPU.

        Raises:
            SubjectBoothError: out of memory, or the latents cannot be read or written.
            Cancelled: by ``on_step``; finished batches are kept.
        """
        store = self._store(prompt)
        latents, _ = store.load()
        drawn = 0

        def sample(batch: tuple[int, ...]) -> torch.Tensor:
            def report(step: int, total: int, preview: Image.Image | None) -> None:
                on_step(drawn + len(batch) * min(1.0, step / max(1, total)), preview)

            return self._samplers[prompt].sample([store.recipe.seed_of(index) for index in batch], report)

        for batch in make_missing(store, latents, count, self._drawing.batch_size, sample):
            drawn += len(batch)
        wanted = torch.stack([latents[index] for index in range(count)])
        parts = wanted.split(self._drawing.batch_size)
        return torch.cat([self._codec.decode(part) for part in parts])

    def _batches(self, found: dict[int, torch.Tensor], count: int) -> list[tuple[int, ...]]:
        return batches_to_make(found.keys(), count, self._drawing.batch_size, self._recipe.grouping)

    def _store(self, prompt: str) -> PriorStore:
        return PriorStore(self._root, replace(self._recipe, prompt=prompt), self._latent_factor)

    @cached_property
    def _samplers(self) -> dict[str, PictureSampler]:
        if self._same_text is not None:
            return {prompt: other.with_model(self._model) for prompt, other in self._same_text._samplers.items()}
        first = PictureSampler.of_recipe(
            self._model,
            self._clip,
            replace(self._recipe, prompt=self._prompts[0]),
            pictures="pictures",
            batch_input="seeds",
            latent_factor=self._latent_factor,
        )
        samplers = {self._prompts[0]: first}
        for prompt in self._prompts[1:]:
            stop_if_cancelled()
            samplers[prompt] = first.with_prompt(self._clip, prompt)
        return samplers
