"""The connected MODEL itself as a denoiser, of whatever family: what is trained is what is sampled.

There is no second copy of the base and no conversion: for the time of a run, the LoRA is put on the layers of ComfyUI's
own module. Noise, times and target are those of the model's own sampling object, prompts those of its CLIP, validation
images those of ComfyUI's sampler.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...trainer.base.conditioning import Conditioning
from ...trainer.base.sd.layout import LdmLayout
from ...trainer.base.times import LOGIT_NORMAL
from ...trainer.config import AUTO
from ...trainer.errors import SubjectBoothError
from ..bridge import has_frames, to_cpu_float32
from ..host import release_models
from ..wired_checks import UNET_PREFIX
from .conditioning import Conds, WiredConditioning, WiredPrompt, together
from .counting import countable
from .families import WiredFamily
from .network import WiredNetwork, is_among, trained_blocks
from .objective import EDM, FLOW, Objective

MOST_CONDS = 64
"""Prompts whose inputs to the model are kept, as some families compute them."""


class WiredDenoiser:
    """See :class:`trainer.base.denoiser.Denoiser`.

    Args:
        model: the connected MODEL; a clone of it is loaded.
        family: what is known about its family.
        latent_factor: image pixels per latent pixel, along a side.
        metadata: the architecture as files state it; None for the family's.
        layout: of a UNet of Stable Diffusion, whose layers are named and ordered as other programs do.
    """

    can_offload = True

    def __init__(
        self,
        model: ModelPatcher,
        family: WiredFamily,
        latent_factor: int,
        metadata: Mapping[str, str] | None = None,
        layout: LdmLayout | None = None,
    ) -> None:
        self._model, self._family, self._metadata, self._layout = model, family, metadata, layout
        self.latent_channels = int(model.model.latent_format.latent_channels)
        self.latent_factor = latent_factor
        self._frames = has_frames(model)
        sampling = model.get_model_object("model_sampling")
        # A ModelSampling node before the trainer says which shift is wanted.
        shift = None if "model_sampling" in model.object_patches else family.shift
        self._objective = Objective(sampling, family.logit_normal and Objective(sampling).kind == FLOW, shift)
        self._conds: dict[Any, Conds] = {}

    @property
    def native_resolution(self) -> int:
        """The family's."""
        return self._family.resolution

    @property
    def guidance_scale(self) -> float:
        """The family's."""
        return self._family.guidance_scale

    @property
    def metadata(self) -> Mapping[str, str]:
        """ModelSpec's architecture, as far as there is a name for it."""
        return self._metadata or {
            "modelspec.architecture": f"{self._family.architecture}/lora",
            "modelspec.prediction_type": self._kind,
        }

    @property
    def _kind(self) -> str:
        return "velocity" if self._objective.kind == FLOW else self._objective.kind

    def latent_size(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, height, width) in latent pixels. A family for video has one frame, which is not counted here."""
        return self.latent_channels, height // self.latent_factor, width // self.latent_factor

    def build(self, dtype: torch.dtype) -> WiredNetwork:
        """The connected model, computing in ``dtype``; loaded at its first use."""
        release_models()
        patcher = self._model.clone()
        if patcher.model.diffusion_model.dtype != dtype or patcher.model.manual_cast_dtype is not None:
            patcher.set_model_compute_dtype(dtype)
        network = WiredNetwork(patcher, self._objective, self._order)
        network.is_tried = self._family.is_tried
        return network

    def outline(self) -> WiredNetwork:
        """Not on the meta device, as it holds no weights either."""
        return WiredNetwork(self._model, self._objective, self._order)

    def adapter_layers(self, network: nn.Module, lora_targets: str) -> dict[str, nn.Module]:
        """Linear layers and 1x1 convolutions of the repeated blocks, see :func:`nodes.wired.network.is_among`; all of a
        UNet, whose time embedding others train too."""
        assert isinstance(network, WiredNetwork)
        if lora_targets == "all" and self._layout is not None:
            return network.layers()
        blocks = tuple(f"{path}." for path in trained_blocks(network.diffusion_model))
        found = {}
        for name, layer in network.layers().items():
            path = network.path_of(name)
            block = next((block for block in blocks if path.startswith(block)), None)
            if block is None or (self._family.frozen and re.match(self._family.frozen, path)):
                continue
            if is_among(path[len(block) :], lora_targets):
                found[name] = layer
        if not found:
            raise SubjectBoothError(
                f"{self._family.name} has no layer that lora_targets {lora_targets} names",
                "layers to train",
                "set lora_targets to all",
                "MODEL",
            )
        return found

    def file_key(self, layer: str) -> str:
        """kohya's name for Stable Diffusion, and otherwise the layer's path in ComfyUI's model, which ComfyUI reads for
        every family."""
        path = WiredNetwork.path_of(layer)
        return UNET_PREFIX + path if self._layout is None else self._layout.kohya_key(path)

    @property
    def _order(self) -> Callable[[str], Any] | None:
        """A LoRA starts with the same weights as through diffusers."""
        return None if self._layout is None else self._layout.order_of

    def enable_gradient_checkpointing(self, network: nn.Module) -> None:
        """Of the repeated blocks."""
        assert isinstance(network, WiredNetwork)
        network.is_checkpointed = True

    def use_attention(self, network: nn.Module, attention: str) -> tuple[str, str]:
        """PyTorch's, whatever is asked for: the model's own layers call ComfyUI's attention."""
        return "sdpa", "" if attention == "sdpa" else f"the connected model is trained with sdpa instead of {attention}"

    def release(self, network: nn.Module) -> None:
        """Leave the connected model as it was."""
        assert isinstance(network, WiredNetwork)
        network.take_off()
        self._conds.clear()

    def with_times(self, sampling: str, shift: float) -> WiredDenoiser:
        """See :meth:`trainer.base.denoiser.Denoiser.with_times`."""
        before = self._objective
        if before.kind == EDM:
            raise SubjectBoothError(
                f"timestep_sampling {sampling} and timestep_shift {shift:g} with {self._family.name}",
                "auto and 0, as this model has noise levels of its own kind (EDM)",
                "set timestep_sampling to auto, and timestep_shift to 0",
                "timestep_sampling",
            )
        logit_normal = before.logit_normal if sampling == AUTO else sampling == LOGIT_NORMAL
        found = copy.copy(self)
        found._objective, found._conds = Objective(before.sampling, logit_normal, shift or before.shift), {}
        return found

    def times(self, uniform: torch.Tensor) -> torch.Tensor:
        """Sigmas, float32."""
        return self._objective.times(uniform)

    def noisy_latents(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """By the model's own sampling object."""
        return self._objective.noisy(latents, noise, times)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """See :meth:`nodes.wired.objective.Objective.target`."""
        return self._objective.target(latents, noise, times)

    def loss_weights(self, times: torch.Tensor, snr_gamma: float) -> torch.Tensor | None:
        """See :meth:`nodes.wired.objective.Objective.loss_weights`."""
        return self._objective.loss_weights(times, snr_gamma)

    def predict(
        self, network: Any, noisy_latents: torch.Tensor, times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The model's output. Prompts of different lengths go through it one after the other."""
        assert isinstance(conditioning, WiredConditioning)
        noisy = noisy_latents.unsqueeze(2) if self._frames else noisy_latents
        rows = [self._conds_for(prompt, noisy[:1]) for prompt in conditioning.prompts]
        parts, first = [], 0
        for count, conds in together(rows):
            last = first + count
            parts.append(network(noisy[first:last], times[first:last], conds))
            first = last
        found = torch.cat(parts).float()
        return found.squeeze(2) if self._frames else found

    def _conds_for(self, prompt: WiredPrompt, noise: torch.Tensor) -> Conds:
        key = prompt.key, tuple(noise.shape), noise.device
        if key not in self._conds:
            while len(self._conds) >= MOST_CONDS:
                del self._conds[next(iter(self._conds))]
            self._conds[key] = prompt.conds(self._model.model, torch.zeros_like(noise), **self._family.training_options)
        return self._conds[key]

    def sample(
        self,
        network: Any,
        prompts: Conditioning,
        negative: Conditioning,
        size: tuple[int, ...],
        steps: int,
        guidance_scale: float,
        seeds: Sequence[int],
        device: torch.device,
    ) -> Generator[int, None, torch.Tensor]:
        """Sample with ComfyUI's Euler, a step at a time, as KSampler (Advanced) nodes in a row do."""
        assert isinstance(prompts, WiredConditioning) and isinstance(negative, WiredConditioning)
        wired: WiredNetwork = getattr(network, "module", network)
        wired.put_on()
        texts = prompts.prompts if len(prompts.prompts) == len(seeds) else prompts.prompts * len(seeds)
        shape = (1, size[0], 1, *size[1:]) if self._frames else (1, *size)
        was_training = wired.training
        wired.eval()
        drawn = []
        try:
            for number, (text, seed) in enumerate(zip(texts, seeds, strict=True)):
                latents = torch.zeros(shape)
                with torch.random.fork_rng(devices=[]):  # ComfyUI seeds the process's own generator
                    noise = comfy.sample.prepare_noise(latents, seed)
                for step in range(steps):
                    with torch.inference_mode():
                        latents = comfy.sample.sample(
                            wired.patcher, noise if step == 0 else torch.zeros_like(noise), steps, guidance_scale,
                            "euler", self._family.scheduler, text.conditioning, negative.prompts[0].conditioning,
                            latents, disable_noise=step > 0, start_step=step, last_step=step + 1,
                            force_full_denoise=step + 1 == steps, disable_pbar=True, seed=seed,
                        )  # fmt: skip
                    if number + 1 == len(seeds):
                        yield step + 1
                with torch.inference_mode():
                    drawn.append(to_cpu_float32(wired.patcher.model.latent_format.process_in(latents)))
        finally:
            wired.train(was_training)
        found = torch.cat(drawn)
        return found.squeeze(2) if self._frames else found

    def base_bytes(self, network: nn.Module) -> int:
        """As ComfyUI counts them, as they are stored."""
        return int(self._model.model_size())

    def make_room(self, network: nn.Module, needed: int) -> None:
        """ComfyUI keeps so much of the device free, and weights for which there is no room in system memory."""
        assert isinstance(network, WiredNetwork)
        network.room = needed

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """None: blocks of image and text have several inputs and outputs."""
        return []

    def countable(self, network: nn.Module, is_checkpointed: bool = False) -> AbstractContextManager[nn.Module]:
        """See :func:`nodes.wired.counting.countable`."""
        assert isinstance(network, WiredNetwork)
        return countable(network, is_checkpointed)
