"""Class images without ComfyUI: the trainer's own sampler on the untouched base, kept on disk like the node's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .base_model import BaseModel
from .memory import memory_errors
from .priors import ClassPriors, PriorRecipe, PriorStore, class_priors, make_missing, split_excluded
from .runtime import DTYPES
from .sample import sample


def generate(
    base: BaseModel, prompt: str, count: int, resolution: int, root: Path, device: torch.device,
    check: Callable[[], None] = lambda: None, *, steps: int = 20, guidance_scale: float = 7.0, seed: int = 0,
    precision: str = "fp32",
) -> Iterator[int | ClassPriors]:
    """Make the class images that are not on the disk yet.

    Args:
        check: called before the first one is drawn, when not all are there: raises what training would be refused for.

    Yields:
        how many of ``count`` are there, after each picture; the finished :class:`ClassPriors` last.

    Raises:
        SubjectBoothError: too little memory; the folder cannot be read or written.
    """
    recipe = PriorRecipe(base.digest, prompt, "", resolution, resolution, "ddim", f"trailing {precision}", steps,
                         guidance_scale, seed, grouping=0)
    store = PriorStore(root, recipe)
    pictures, _ = store.load()
    if any(number not in pictures for number in range(count)):
        check()
        with memory_errors(
                f"too little memory on {device} for a class image of {resolution} pixels", "a smaller picture",
                "lower resolution or close other programs; the finished class images are kept", "class images"):
            conditioning, negative = base.prompts.encode([prompt, ""])  # before the UNet takes the memory
            unet = base.build_unet(DTYPES[precision]).to(device)
            shape = (4, resolution // 8, resolution // 8)

            def draw(numbers: tuple[int, ...]) -> torch.Tensor:
                drawn = []
                for number in numbers:
                    drawing = sample(unet, base.noise_scheduler, conditioning, negative, shape, steps, guidance_scale,
                                     recipe.seed_of(number), device)
                    while True:
                        try:
                            next(drawing)
                        except StopIteration as finished:
                            drawn.append(finished.value)
                            break
                return torch.cat(drawn)

            for _ in make_missing(store, pictures, count, 1, draw):
                yield sum(number in pictures for number in range(count))
    used, _ = split_excluded(pictures, count, ())
    yield class_priors(pictures, used, store, base.family.name)
