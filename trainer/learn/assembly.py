"""The state of a training: network and text encoders with their LoRA, optimizer, and accelerate around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..base.base_model import BaseModel
from ..base.conditioning import Conditioning, concatenate
from ..base.denoiser import frozen_bytes
from ..config import TrainConfig
from ..errors import SubjectBoothError
from ..machine.attention import choose_attention
from ..machine.compilation import CompiledBlocks, choose_compile
from ..machine.numerics import DTYPES
from ..machine.out_of_memory import free_bytes
from ..machine.processes import current
from ..machine.resolved_settings import ResolvedSettings
from ..machine.runtime import IsolatedAccelerate, accelerate_precision, choose_precision
from ..memory.plan import FreeMemory, Load, Plan, make_plan
from ..preserve.curvature_estimate import estimate_bytes
from . import adapter
from .checkpoint import Checkpoint
from .ema import AdapterAverage
from .old_checkpoints import without_unused_layers
from .optimizers import flat_state, group_values, make_optimizer, usable_optimizer

RateFactor = Callable[[str], float]
"""A factor of the learning rate, for an adapter's weight by name (``"<layer>.lora_A.weight"``)."""

NETWORK = "unet"
"""The name of the network, of any kind, among the modules in a checkpoint."""


class Assembly:
    """The trained modules of one run.

    Args:
        base: the base to train on; its network and text encoders are built here.
        config: the requested settings.
        device: where to train; None lets accelerate choose.
        resume: the checkpoint to resume from; None for a new run.
        load: the inputs of the largest step.
        free_memory: bytes free on a device; None asks torch and the system.
        rate_factor: see :class:`trainer.learn.loop.Training`.

    Attributes:
        modules: network and text encoders by name, unwrapped.
        network: the network, wrapped by accelerate.
        optimizer: the optimizer, wrapped by accelerate.
        parameters: all trained parameters.
        chosen: the values of ``auto`` settings; a resumed run keeps those of its start.
        plan: the memory plan.
        notes: sentences for the user about changed settings.
        compiled: the network's blocks, if they are to be compiled.
    """

    def __init__(
        self,
        base: BaseModel,
        config: TrainConfig,
        device: torch.device | None,
        resume: Checkpoint | None,
        load: Load,
        free_memory: FreeMemory | None = None,
        rate_factor: RateFactor | None = None,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.utils import AutocastKwargs

        self._base, self._config = base, config
        self._accelerate = IsolatedAccelerate(device)
        self.device = device or self._accelerate.device()
        # A resumed run keeps the choices of its start: another precision would give other weights.
        kept = ResolvedSettings.from_settings(resume.chosen) if resume else None
        precision, self.notes = choose_precision(config, self.device, kept.precision if kept else None)
        asked = kept.optimizer if kept else config.optimizer
        optimizer, missing = usable_optimizer(asked, self.device)
        self.chosen = ResolvedSettings(optimizer, str(self.device), precision)
        # No autocast: the base computes in its own dtype, as it does when images are drawn with it, and casts nothing.
        # For fp16, accelerate is still to scale losses.
        without_autocast = AutocastKwargs(enabled=False)
        with self._accelerate.installed():
            self.accelerator = Accelerator(
                mixed_precision=accelerate_precision(precision),
                cpu=self.device.type == "cpu",
                device_placement=False,
                kwargs_handlers=[without_autocast],
            )
        self.modules: dict[str, nn.Module] = {}
        parameters = self._add_network(DTYPES[precision])
        text_parameters = self._add_text_encoders(DTYPES[precision]) if config.train_text_encoder else []
        self.parameters = parameters + text_parameters
        for module in self.modules.values():
            module.train()  # diffusers applies gradient checkpointing only in train mode; the base has no dropout
        self._groups = parameters, text_parameters
        names = adapter.parameter_names(self.modules[NETWORK])
        self._factors = [rate_factor(name) for name in names] if rate_factor else []
        self.plan = self._make_plan(kept, load, free_memory or free_bytes)
        self.chosen = self.plan.chosen
        base.denoiser.make_room(self.modules[NETWORK], self.plan.beside_base)
        for module in self.modules.values():
            module.to(self.device)
        if resume:
            resume = without_unused_layers(resume, self.modules)
            self._load(resume.adapter)
        self._use_checkpointing()
        self._use_attention()
        self.compiled = self._compiled(config.steps - (resume.step if resume else 0), load)
        self._optimizer, notes = self._make_optimizer()
        self.notes += tuple(note for note in (missing, *notes, self.plan.warning) if note)
        self._average = AdapterAverage(self.parameters, config.ema_decay) if config.ema_decay else None
        if resume and self._average:
            self._average.average = [tensor.to(self.device) for tensor in resume.average]
        if resume and self.chosen.optimizer == asked:
            self._resume_optimizer(resume)
        with self._accelerate.installed():
            prepared = self.accelerator.prepare(*self.modules.values(), self._optimizer)
        self.network, *self._text_encoders, self.optimizer = prepared
        if resume and resume.scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(resume.scaler)
        self._tokens: dict[str, Any] = {}
        self._final: dict[str, Conditioning] | None = None

    def agree(self) -> None:
        """Continue with the main process's weights and settings, which it may have lowered in the meantime.

        Raises:
            SubjectBoothError: the processes' devices need different settings.
        """
        processes = current()
        if processes.count == 1:
            return
        main = processes.from_main(lambda: self.chosen)
        can = usable_optimizer(main.optimizer, self.device)[0] == main.optimizer
        found = processes.exchange((self.chosen.precision, main.optimizer if can else self.chosen.optimizer))
        different = [number for number, values in enumerate(found) if values != found[0]]
        if different:
            raise SubjectBoothError(
                f"process 1 would use {' and '.join(found[0])}, process {different[0] + 1} "
                f"{' and '.join(found[different[0]])}",
                "the same precision and optimizer in all processes",
                "set both to what every device can use",
                "precision",
            )
        self.use(replace(main, device=self.chosen.device, attention=self.chosen.attention))
        with torch.no_grad():
            weights: list[torch.Tensor] = [parameter.data for parameter in self.parameters]
            if not processes.is_main:
                torch._foreach_zero_(weights)
            processes.add_up(weights)

    @property
    def trains_text(self) -> bool:
        """Whether a text encoder is trained, so that prompts are encoded at each step."""
        return bool(self._text_encoders)

    @property
    def training_modules(self) -> list[nn.Module]:
        """The modules whose LoRA is still trained: those of :attr:`modules` without text encoders that are frozen."""
        return [module for name, module in self.modules.items() if self._final is None or name == NETWORK]

    def freeze_text(self) -> None:
        """Stop training the text encoders: from now on :meth:`encode` uses no dropout and encodes each prompt once.
        Repeated calls do nothing."""
        if self._final is None:
            self._final = {}
            for model in self._text_encoders:
                model.eval()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode a batch of prompts for training, with the LoRA of the text encoders."""
        if self._final is None:
            encoded = self._encode(prompts, learn=True)
        else:
            encoded = self._final
            encoded |= self._encode([prompt for prompt in prompts if prompt not in encoded], learn=False)
        return concatenate([encoded[prompt] for prompt in prompts])

    def encode_to_draw(self, prompts: Sequence[str]) -> Conditioning:
        """Encode a batch of prompts for validation images: without dropout, and without the cache of :meth:`encode`,
        because the modules may hold the running average."""
        was_training = [model.training for model in self._text_encoders]
        for model in self._text_encoders:
            model.eval()
        try:
            encoded = self._encode(prompts, learn=False)
        finally:
            for model, training in zip(self._text_encoders, was_training, strict=True):
                model.train(training)
        return concatenate([encoded[prompt] for prompt in prompts])

    def _encode(self, prompts: Sequence[str], learn: bool) -> dict[str, Conditioning]:
        """Encode each distinct prompt once; ``learn`` records the graph for the backward pass."""
        text = self._base.text
        assert text is not None
        for prompt in prompts:
            if prompt not in self._tokens:
                self._tokens[prompt] = text.tokenize(prompt)
        unique = list(dict.fromkeys(prompts))
        with torch.set_grad_enabled(learn):
            encoded = text.encode(self._text_encoders, [self._tokens[prompt] for prompt in unique])
        return dict(zip(unique, encoded, strict=True))

    def use(self, chosen: ResolvedSettings) -> None:
        """Switch to settings that need less memory; a new optimizer starts with empty state."""
        before, self.chosen = self.chosen, chosen
        self._use_checkpointing()
        if chosen.optimizer != before.optimizer:
            self._use_chosen_optimizer()

    def _use_checkpointing(self) -> None:
        if self.chosen.gradient_checkpointing:
            self._base.denoiser.enable_gradient_checkpointing(self.modules[NETWORK])

    def _use_chosen_optimizer(self) -> None:
        self._optimizer, _ = self._make_optimizer()
        # accelerate unscales fp16 gradients once per optimizer that it knows.
        self.accelerator._optimizers.clear()
        with self._accelerate.installed():
            self.optimizer = self.accelerator.prepare(self._optimizer)

    def _use_attention(self) -> None:
        # Chosen again on every machine, because kernels differ only by rounding.
        attention, missing = choose_attention(self._config.attention, self.device)
        attention, unusable = self._base.denoiser.use_attention(self.modules[NETWORK], attention)
        self.chosen = replace(self.chosen, attention=attention)
        self.notes += tuple(note for note in (missing, unusable) if note)

    def leave_out_if_not_finite(self, values: torch.Tensor) -> bool:
        """Make the optimizer leave out its next step if one of the numbers is NaN or infinity, which the device can see
        without the host; False if it cannot.

        Args:
            values: on the device.
        """
        optimizer: Any = self._optimizer
        # With loss scaling, torch's scaler says what is left out, by the gradients alone.
        if not getattr(optimizer, "_step_supports_amp_scaling", False) or self.accelerator.scaler is not None:
            return False
        optimizer.found_inf = 1.0 - values.isfinite().all().float()
        return True

    def _compiled(self, steps: int, load: Load) -> CompiledBlocks | None:
        # Chosen again by every process, as attention is, because compiled kernels differ only by rounding.
        pixels = self._base.denoiser.latent_factor**2 * load.size[0] * load.size[1]
        wanted, missing = choose_compile(self._config.compile, self.device, steps, load.pictures, pixels)
        blocks = self._base.denoiser.blocks(self.modules[NETWORK]) if wanted else []
        if wanted and not blocks and self._config.compile == "on":
            missing = f"{self._base.family} cannot be compiled: it is trained as it is connected"
        self.notes += (missing,) if missing else ()
        self.chosen = replace(self.chosen, compile=bool(blocks))
        return CompiledBlocks(blocks) if blocks else None

    def stop_compiling(self) -> None:
        """From now on, run the blocks as they are."""
        self.compiled, self.chosen = None, replace(self.chosen, compile=False)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the modules hold the weights to save and to sample with: the running average, if there is one."""
        return self._average.applied() if self._average else nullcontext()

    def update_average(self, step: int) -> None:
        """Update the running average after optimizer step number ``step``, counted from 0."""
        if self._average:
            self._average.update(step)

    def lora(self) -> dict[str, torch.Tensor]:
        """The current LoRA under kohya's keys."""
        alpha = adapter.file_alpha(self._config)
        with self.averaged():
            states = {name: adapter.adapter_state(module) for name, module in self.modules.items()}
        file = adapter.to_file(states.pop(NETWORK), self._base.denoiser.file_key, alpha)
        for prefix, state in states.items():
            assert self._base.text is not None
            file |= adapter.to_file(state, partial(self._base.text.file_key, prefix), alpha)
        return file

    def snapshot(self, step: int, losses: Sequence[Mapping[str, float]]) -> Checkpoint:
        """The current state of the run, copied to the CPU."""
        optimizer: dict[int, dict[str, Any]] = {
            index: {
                name: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
                for name, value in flat_state(entries).items()
            }
            for index, entries in self._optimizer.state_dict()["state"].items()
        }
        weights = {
            f"{name}/{key}": tensor
            for name, module in self.modules.items()
            for key, tensor in adapter.adapter_state(module).items()
        }
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else {}
        average = [tensor.cpu().clone() for tensor in self._average.average] if self._average else []
        return Checkpoint(
            step,
            weights,
            optimizer,
            [dict(row) for row in losses],
            self.chosen.as_settings(),
            group_values(self._optimizer),
            average,
            scaler,
        )

    def close(self) -> None:
        """Make accelerate release its references to the model."""
        self.accelerator.free_memory()
        self._base.denoiser.release(self.modules[NETWORK])

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, tuple[str, ...]]:
        config = replace(self._config, optimizer=self.chosen.optimizer)
        return make_optimizer(*self._groups, config, self.device, self._factors)

    def _make_plan(self, kept: ResolvedSettings | None, load: Load, free_memory: FreeMemory) -> Plan:
        network, *text_encoders = self.modules.values()
        free = current().free(free_memory(self.device))
        if free is not None and self.device.type == "cpu":  # the weights are there already
            free += sum(frozen_bytes(encoder) for encoder in text_encoders) + self._base.denoiser.base_bytes(network)
        base = self._base
        layers = [layer for module in self.modules.values() for layer in adapter.lora_layers(module)]
        studied = estimate_bytes(layer.get_base_layer().weight.shape[:2] for layer in layers) if load.is_studied else 0
        return make_plan(
            self._config, self.chosen, kept, base.denoiser, network, base.text, text_encoders, load, free, studied
        )

    def _add_network(self, dtype: torch.dtype) -> list[nn.Parameter]:
        denoiser = self._base.denoiser
        network = self.modules[NETWORK] = denoiser.build(dtype)
        layers = denoiser.adapter_layers(network, self._config.lora_targets)
        return adapter.inject(network, self._config, layers, dtype)

    def _add_text_encoders(self, dtype: torch.dtype) -> list[nn.Parameter]:
        text = self._base.text
        assert text is not None
        parameters = []
        for prefix, model in text.build(dtype).items():
            layers = text.adapter_layers(prefix, model, self._config.lora_targets)
            parameters += adapter.inject(model, self._config, layers, dtype)
            self.modules[prefix] = model
        return parameters

    def _load(self, weights: dict[str, torch.Tensor]) -> None:
        for name, module in self.modules.items():
            own = {
                key.removeprefix(f"{name}/"): tensor for key, tensor in weights.items() if key.startswith(f"{name}/")
            }
            adapter.load_adapter_state(module, own)

    def _resume_optimizer(self, resume: Checkpoint) -> None:
        groups = [
            {**group, **saved}
            for group, saved in zip(self._optimizer.state_dict()["param_groups"], resume.groups, strict=True)
        ]
        self._optimizer.load_state_dict({"state": resume.optimizer, "param_groups": groups})
