"""Class images without ComfyUI: sampled by the trainer from the base, and stored like those of the node."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch

from ..base.base_model import BaseModel
from ..machine.numerics import DTYPES, with_default_numerics
from ..machine.out_of_memory import free_bytes, memory_errors
from ..machine.processes import current
from ..memory.drawing import Drawing, draw_all, pictures_at_once
from ..memory.plan import FreeMemory
from .priors import ClassPriors, PriorRecipe, PriorStore, class_priors, make_missing, split_excluded


def generate(
    base: BaseModel,
    prompt: str,
    count: int,
    resolution: int,
    root: Path,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
    *,
    steps: int = 20,
    guidance_scale: float = 7.0,
    seed: int = 0,
    precision: str = "fp32",
    free: FreeMemory = free_bytes,
) -> Iterator[int | ClassPriors]:
    """Generate the class images that are missing on disk.

    On a GPU the batch size is what fits in memory; it is lowered if memory still runs out. Several processes share the
    images out; the main one saves them.

    Args:
        check: called before the first image is generated, if any is missing; raises errors that training would raise.
        free: bytes free on a device.

    Yields:
        the number of images ready, of ``count``, after each batch; the :class:`ClassPriors` last.

    Raises:
        SubjectBoothError: too little memory; the folder cannot be read or written.
    """
    yield from with_default_numerics(
        _generate(base, prompt, count, resolution, root, device, check, steps, guidance_scale, seed, precision, free),
        device,
    )


def _generate(
    base: BaseModel,
    prompt: str,
    count: int,
    resolution: int,
    root: Path,
    device: torch.device,
    check: Callable[[], None],
    steps: int,
    guidance_scale: float,
    seed: int,
    precision: str,
    free: FreeMemory,
) -> Generator[int | ClassPriors, None, None]:
    recipe = PriorRecipe(
        base.digest,
        prompt,
        "",
        resolution,
        resolution,
        "ddim",
        f"trailing {precision}",
        steps,
        guidance_scale,
        seed,
        grouping=0,
    )
    processes = current()
    store = PriorStore(root, recipe, base.denoiser.latent_factor, writes=processes.is_main)
    pictures, _ = processes.from_main(store.load)
    if any(number not in pictures for number in range(count)):
        check()
        with memory_errors(
            f"too little memory on {device} for a class image of {resolution} pixels",
            "a smaller image",
            "lower resolution or close other programs; the finished class images are kept",
            "class images",
        ):
            conditioning, negative = base.prompts.encode([prompt, ""])  # before the network takes memory
            denoiser, dtype = base.denoiser, DTYPES[precision]
            network = denoiser.build(dtype).to(device)
            size = denoiser.latent_size(resolution, resolution)

            missing = sum(number not in pictures for number in range(count))
            known = processes.free(free(device))
            at_once = pictures_at_once(denoiser, network, conditioning, size, dtype, missing, device, known)

            def draw_share(numbers: tuple[int, ...]) -> torch.Tensor:
                first, last = processes.share(len(numbers))
                own = draw(numbers[first:last]) if last > first else torch.empty(0, *size)
                return torch.cat(processes.exchange(own))

            def draw(numbers: tuple[int, ...]) -> torch.Tensor:
                def together(first: int, last: int) -> Generator[int, None, torch.Tensor]:
                    seeds = [recipe.seed_of(number) for number in numbers[first:last]]
                    return denoiser.sample(network, conditioning, negative, size, steps, guidance_scale, seeds, device)

                drawing = Drawing(draw_all(together, len(numbers), len(numbers), steps, device))
                for _ in drawing:
                    pass
                return drawing.latents

            # Not in the recipe: the batch size affects an image only by rounding, as the GPU does.
            for _ in make_missing(store, pictures, count, at_once * processes.count, draw_share):
                yield sum(number in pictures for number in range(count))
    used, _ = split_excluded(pictures, count, ())
    yield class_priors(pictures, used, store, base.family)
