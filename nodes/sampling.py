"""Sampling with ComfyUI's own sampler, as KSampler does; each image is reproducible on its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io
from PIL import Image

from ..trainer.errors import SubjectBoothError
from ..trainer.machine import out_of_memory as memory
from ..trainer.memory.plan import pictures_that_fit
from ..trainer.preserve.priors import PriorRecipe
from .bridge import has_frames, to_cpu_float32
from .noise import restore_schedule
from .wired_checks import ATTENTION_OVERRIDE

# These add no noise and treat each image of a batch separately, so that an image is the same in a batch of any size (a
# test compares each with KSampler). Any other sampler is assumed to depend on the batch: ancestral and SDE samplers
# draw noise for the whole batch, and dpm_adaptive chooses one step size for it.
BATCH_INDEPENDENT = frozenset(
    (
        "euler", "euler_cfg_pp", "heun", "heunpp2", "dpm_2", "lms", "dpm_fast", "dpmpp_2m", "dpmpp_2m_cfg_pp", "ipndm",
        "ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp",
        "ddim", "uni_pc", "uni_pc_bh2",
    )
)  # fmt: skip

MOST_AT_ONCE = 4
"""Maximum automatic batch size: larger batches are hardly faster."""

StepCallback = Callable[[int, int, Image.Image | None], None]
"""Called after each denoising step with the steps done, the total, and a rough image if previews are on."""


def automatic_batch_size(model: ModelPatcher, resolution: int, factor: int, sampler_name: str) -> int:
    """How many images to sample per batch, from ComfyUI's own memory estimate and free memory.

    If an image depends on its batch, the batch must not depend on the memory that happens to be free.

    Args:
        factor: image pixels per latent pixel, along a side.
    """
    if sampler_name not in BATCH_INDEPENDENT:
        return MOST_AT_ONCE
    side, channels = resolution // factor, model.model.latent_format.latent_channels
    room, times = memory_for_images(model)
    # Each image takes two places in a batch: one for the prompt, one for the negative prompt.
    return pictures_that_fit(
        lambda pictures: times * model.model.memory_required([2 * pictures, channels, side, side]), room, MOST_AT_ONCE
    )


def memory_for_images(model: ModelPatcher) -> tuple[float, float]:
    """Bytes available for images once ComfyUI has made room for this model, and the safety factor for its estimate of a
    batch.

    With dynamic VRAM all loaded weights count as free, including this model's: ComfyUI streams what does not fit, which
    costs less than a smaller batch, and it accepts a batch that fits one and a half times (the estimate on its patcher
    is padded for another purpose). Otherwise, memory held by other models counts as free, as they are unloaded for
    this one (on a CPU that frees nothing), and memory for the part of this model that is not yet loaded does not.
    """
    device = model.load_device
    if getattr(model, "is_dynamic", bool)():
        return model.get_free_memory(device), 1.5
    room: float = comfy.model_management.get_free_memory(device)
    if not comfy.model_management.is_device_cpu(device):
        others = [loaded.model for loaded in comfy.model_management.current_loaded_models if loaded.device == device]
        room += sum(other.loaded_size() for other in others if other is not None and not model.is_clone(other))
    return room - (model.model_size() - model.loaded_size()), 1.0


def sampler_inputs(
    pictures: str, cfg: str = "", sampler_name: str = "", seed: str = "", usual_cfg: float = 7.0
) -> list[io.Input]:
    """The inputs steps, cfg, sampler_name, scheduler and seed.

    Args:
        pictures: what is sampled, in the singular, for the tooltips.
        cfg, sampler_name, seed: what else their tooltips say.
        usual_cfg: the default of cfg.
    """
    samplers, article = comfy.samplers.KSampler, "an" if pictures[0] in "aeiou" else "a"
    return [
        io.Int.Input("steps", default=20, min=1, max=1000, tooltip=f"Denoising steps per {pictures}."),
        io.Float.Input(
            "cfg",
            default=usual_cfg,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip=f"Classifier-free guidance: how closely {article} {pictures} follows the prompt.{cfg}",
        ),
        io.Combo.Input(
            "sampler_name",
            options=list(samplers.SAMPLERS),
            default="dpmpp_2m",
            tooltip=f"As in KSampler.{sampler_name}",
        ),
        io.Combo.Input("scheduler", options=list(samplers.SCHEDULERS), default="karras", tooltip="As in KSampler."),
        io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=False, tooltip=seed),
    ]


def check_choices(sampler_name: str, scheduler: str, cfg: float) -> None:
    """ComfyUI 0.3.75 accepts any text for a V3 combo, and NaN for a number.

    Raises:
        SubjectBoothError: ComfyUI has no such sampler or scheduler, or cfg is not finite.
    """
    choices: dict[str, tuple[Any, list[str]]] = {
        "sampler_name": (sampler_name, list(comfy.samplers.KSampler.SAMPLERS)),
        "scheduler": (scheduler, list(comfy.samplers.KSampler.SCHEDULERS)),
    }
    for name, (given, known) in choices.items():
        if given not in known:
            raise SubjectBoothError(
                f"{name} {str(given)[:60]!r}", f"one of ComfyUI's, such as {known[0]}", "choose one from the list", name
            )
    if not math.isfinite(cfg):
        raise SubjectBoothError(f"cfg {cfg}", "a number from 0 to 100", "set cfg to 7", "cfg")


class PictureSampler:
    """Samples images of one prompt.

    Args:
        model: the connected model. Guidance patches of other nodes (RescaleCFG and the like) are removed, as they
            cannot be identified reliably across runs.
        clip: encodes the prompts.
        prompt, negative: the prompts.
        size: (width, height) in pixels, multiples of 8.
        sampler_name, scheduler, steps, cfg: as in KSampler.
        pictures: what the images are for, as an error names them.
        batch_input: the node's input to lower if memory runs out.
        latent_factor: image pixels per latent pixel, along a side.
    """

    def __init__(
        self,
        model: ModelPatcher,
        clip: CLIP,
        *,
        prompt: str,
        negative: str,
        size: tuple[int, int],
        sampler_name: str,
        scheduler: str,
        steps: int,
        cfg: float,
        pictures: str = "class images",
        batch_input: str = "batch_size",
        latent_factor: int = 8,
    ) -> None:
        self._model, self.dropped = without_guidance_patches(model)
        restore_schedule(self._model)
        self._pictures, self._batch_input = pictures, batch_input
        self._positive, self._negative = encode(clip, prompt), encode(clip, negative)
        self._size, self._latent_factor = size, latent_factor
        self._settings = {"steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler}
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    @classmethod
    def of_recipe(cls, model: ModelPatcher, clip: CLIP, recipe: PriorRecipe, **options: Any) -> PictureSampler:
        """Samples the images of a recipe.

        Args:
            options: ``pictures``, ``batch_input`` and ``latent_factor``.
        """
        return cls(
            model,
            clip,
            prompt=recipe.prompt,
            negative=recipe.negative,
            size=(recipe.width, recipe.height),
            sampler_name=recipe.sampler_name,
            scheduler=recipe.scheduler,
            steps=recipe.steps,
            cfg=recipe.cfg,
            **options,
        )

    def with_prompt(self, clip: CLIP, prompt: str) -> PictureSampler:
        """The same for another prompt; the negative prompt is not encoded again."""
        other = copy.copy(self)
        other._positive = encode(clip, prompt)
        return other

    def with_model(self, model: ModelPatcher) -> PictureSampler:
        """The same with another model of the same kind; no prompt is encoded again."""
        other = copy.copy(self)
        other._model, other.dropped = without_guidance_patches(model)
        restore_schedule(other._model)
        return other

    def sample(self, seeds: Sequence[int], on_step: StepCallback) -> torch.Tensor:
        """Latents float32 [n, c, h, w] on the CPU, in the training space.

        The initial noise of each image is that of KSampler with its seed and batch size 1. Samplers that draw more
        noise are seeded with the first image's seed, which for a batch of one also matches KSampler.

        Raises:
            SubjectBoothError: out of memory.
            comfy.model_management.InterruptProcessingException: cancelled; raised by ``on_step``.
        """
        empty = torch.zeros([1, 4, *(side // self._latent_factor for side in reversed(self._size))])
        empty = comfy.sample.fix_empty_latent_channels(self._model, empty)
        # Not prepare_noise, which seeds the global generators of the process and of all GPUs.
        noise = torch.cat(
            [comfy.sample.prepare_noise_inner(empty, torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
        )

        def callback(step: int, x0: torch.Tensor, x: torch.Tensor, total_steps: int) -> None:
            preview = self._previewer.decode_latent_to_preview_image("JPEG", x0)[1] if self._previewer else None
            on_step(step + 1, total_steps, preview)

        try:
            samples = comfy.sample.sample(
                self._model,
                noise,
                positive=self._positive,
                negative=self._negative,
                latent_image=torch.cat([empty] * len(seeds)),
                denoise=1.0,
                callback=callback,
                disable_pbar=True,
                seed=seeds[0],
                **self._settings,
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            comfy.model_management.unload_all_models()
            width, height = self._size
            raise SubjectBoothError(
                f"ran out of memory with {len(seeds)} {self._pictures} of {width}x{height} pixels per batch",
                "a smaller batch",
                f"lower {self._batch_input} and queue again; finished images are kept",
                self._batch_input,
            ) from error
        latents = to_cpu_float32(self._model.get_model_object("latent_format").process_in(samples))
        return latents.squeeze(2) if has_frames(self._model) else latents


def encode(clip: CLIP, text: str) -> Any:
    """Encode a prompt as ComfyUI's CLIPTextEncode does."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def is_out_of_memory(error: Exception) -> bool:
    """By the trainer's check, or that of newer ComfyUIs (``is_oom``), which may know further devices."""
    theirs = getattr(comfy.model_management, "is_oom", None)
    return memory.is_out_of_memory(error) or (theirs is not None and bool(theirs(error)))


def without_guidance_patches(model: ModelPatcher) -> tuple[ModelPatcher, list[str]]:
    """The model without guidance and attention patches, and the names of those removed."""
    named = ("sampler_", "disable_cfg1_optimization", "denoise_mask_function")
    found = [name for name, value in model.model_options.items() if name.startswith(named) and value]
    overridden = model.model_options.get("transformer_options", {}).get(ATTENTION_OVERRIDE) is not None
    if not found and not overridden:
        return model, []
    plain = model.clone()
    for name in found:
        del plain.model_options[name]
    if overridden:
        del plain.model_options["transformer_options"][ATTENTION_OVERRIDE]
        found.append(ATTENTION_OVERRIDE)
    return plain, found
