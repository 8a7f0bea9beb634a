"""What is trained, put together: network and text encoders with their LoRA, optimizer, and accelerate around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..base.base_model import BaseModel
from ..base.conditioning import Conditioning, concatenate
from ..config import TrainConfig
from ..machine.attention import choose_attention
from ..machine.numerics import DTYPES
from ..machine.out_of_memory import free_bytes
from ..machine.resolved_settings import ResolvedSettings
from ..machine.runtime import IsolatedAccelerate, accelerate_precision, choose_precision
from ..memory.plan import FreeMemory, Load, Plan, make_plan
from . import adapter
from .checkpoint import Checkpoint
from .ema import AdapterAverage
from .old_checkpoints import without_unused_layers
from .optimizers import make_optimizer, usable_optimizer

RateFactor = Callable[[str], float]
"""A factor of the learning rate, for an adapter's weight by name (``"<layer>.lora_A.weight"``)."""

NETWORK = "unet"
"""What a checkpoint calls the network, of whatever kind, among the modules with a LoRA."""


class Assembly:
    """The trained modules of one run.

    Args:
        base: what is trained on; its network (and text encoders) are built here.
        config: the requested settings.
        device: where to train; None lets accelerate choose.
        resume: weights and optimizer state to go on with.
        load: what one step takes in.
        free_memory: bytes free on a device; None asks torch and the system.
        rate_factor: see :class:`trainer.learn.loop.Training`.

    Attributes:
        modules: network and text encoders by name, as they were built.
        network: the network as accelerate wraps it.
        optimizer: likewise.
        parameters: everything that is trained.
        chosen: what every ``auto`` became; a resumed run keeps its first choice.
        plan: what will be in memory.
        notes: sentences for the user about what had to be changed.
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
        # A resumed run keeps what was chosen at its start: another precision would give other weights.
        kept = ResolvedSettings.from_settings(resume.chosen) if resume else None
        precision, self.notes = choose_precision(config, self.device, kept.precision if kept else None)
        asked = kept.optimizer if kept else config.optimizer
        optimizer, missing = usable_optimizer(asked, self.device)
        self.chosen = ResolvedSettings(optimizer, str(self.device), precision)
        # Only the outermost autocast empties the cache of weights in half. That one may be another pack's, and then the
        # cache would still have the weights of before the last step.
        without_cache = AutocastKwargs(cache_enabled=False)
        with self._accelerate.installed():
            self.accelerator = Accelerator(
                mixed_precision=accelerate_precision(precision),
                cpu=self.device.type == "cpu",
                device_placement=False,
                kwargs_handlers=[without_cache],
            )
        self.modules: dict[str, nn.Module] = {}
        parameters = self._add_network(DTYPES[precision])
        text_parameters = self._add_text_encoders(DTYPES[precision]) if config.train_text_encoder else []
        self.parameters = parameters + text_parameters
        for module in self.modules.values():
            module.train()  # diffusers checkpoints activations in train mode only; the base has no dropout
        self._groups = parameters, text_parameters
        names = adapter.parameter_names(self.modules[NETWORK])
        self._factors = [rate_factor(name) for name in names] if rate_factor else []
        self.plan = self._make_plan(kept, load, free_memory or free_bytes)
        self.chosen = self.plan.chosen
        for module in self.modules.values():
            module.to(self.device)
        if resume:
            resume = without_unused_layers(resume, self.modules)
            self._load(resume.adapter)
        self._use_checkpointing()
        self._use_attention()
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

    @property
    def trains_text(self) -> bool:
        """Whether there is a text encoder with a LoRA, which prompts have to go through."""
        return bool(self._text_encoders)

    def freeze_text(self) -> None:
        """From here on the text encoder's LoRA stays as it is: :meth:`encode` leaves nothing out any more, and encodes
        each prompt only once. May be called again."""
        if self._final is None:
            self._final = {}
            for model in self._text_encoders:
                model.eval()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """A batch of prompts to learn from, through the text encoders with their LoRA."""
        if self._final is None:
            encoded = self._encode(prompts, learn=True)
        else:
            encoded = self._final
            encoded |= self._encode([prompt for prompt in prompts if prompt not in encoded], learn=False)
        return concatenate([encoded[prompt] for prompt in prompts])

    def encode_to_draw(self, prompts: Sequence[str]) -> Conditioning:
        """The same for validation pictures, of which the LoRA's dropout leaves nothing out. Never from what was encoded
        before, as the modules may have the running average."""
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
        """Each of the prompts once. ``learn`` keeps what the backward pass needs."""
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
        """Go on with settings that need less memory; another optimizer's own averages start from nothing."""
        before, self.chosen = self.chosen, chosen
        self._use_checkpointing()
        if chosen.optimizer != before.optimizer:
            self._use_chosen_optimizer()

    def _use_checkpointing(self) -> None:
        if self.chosen.gradient_checkpointing:
            self._base.denoiser.enable_gradient_checkpointing(self.modules[NETWORK])

    def _use_chosen_optimizer(self) -> None:
        self._optimizer, _ = self._make_optimizer()
        # Gradients of fp16 are unscaled once for every optimizer that accelerate knows.
        self.accelerator._optimizers.clear()
        with self._accelerate.installed():
            self.optimizer = self.accelerator.prepare(self._optimizer)

    def _use_attention(self) -> None:
        # ResolvedSettings anew on every machine: kernels differ by rounding only.
        attention, missing = choose_attention(self._config.attention, self.device)
        attention, unusable = self._base.denoiser.use_attention(self.modules[NETWORK], attention)
        self.chosen = replace(self.chosen, attention=attention)
        self.notes += tuple(note for note in (missing, unusable) if note)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the modules have what is saved and shown: the running average, if there is one."""
        return self._average.applied() if self._average else nullcontext()

    def update_average(self, step: int) -> None:
        """Take optimizer update number ``step``, counted from 0, into the running average."""
        if self._average:
            self._average.update(step)

    def lora(self) -> dict[str, torch.Tensor]:
        """The adapter as it is now, with kohya's names."""
        alpha = adapter.file_alpha(self._config)
        with self.averaged():
            states = {name: adapter.adapter_state(module) for name, module in self.modules.items()}
        file = adapter.to_file(states.pop(NETWORK), self._base.denoiser.file_key, alpha)
        for prefix, state in states.items():
            assert self._base.text is not None
            file |= adapter.to_file(state, partial(self._base.text.file_key, prefix), alpha)
        return file

    def snapshot(self, step: int, losses: Sequence[Mapping[str, float]]) -> Checkpoint:
        """The run as it is now, copied to the CPU."""
        optimizer: dict[int, dict[str, Any]] = {
            index: {
                name: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
                for name, value in _flat(entries).items()
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
            _plain_groups(self._optimizer),
            average,
            scaler,
        )

    def close(self) -> None:
        """Let accelerate drop its references to the model."""
        self.accelerator.free_memory()

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, tuple[str, ...]]:
        config = replace(self._config, optimizer=self.chosen.optimizer)
        return make_optimizer(*self._groups, config, self.device, self._factors)

    def _make_plan(self, kept: ResolvedSettings | None, load: Load, free_memory: FreeMemory) -> Plan:
        network, *text_encoders = self.modules.values()
        free = free_memory(self.device)
        if free is not None and self.device.type == "cpu":  # the weights lie there already
            free += sum(tensor.nbytes for module in self.modules.values() for tensor in module.parameters())
        base = self._base
        return make_plan(self._config, self.chosen, kept, base.denoiser, network, base.text, text_encoders, load, free)

    def _add_network(self, dtype: torch.dtype) -> list[nn.Parameter]:
        denoiser = self._base.denoiser
        network = self.modules[NETWORK] = denoiser.build(dtype)
        return adapter.inject(network, self._config, denoiser.adapter_layers(network, self._config.lora_targets))

    def _add_text_encoders(self, dtype: torch.dtype) -> list[nn.Parameter]:
        text = self._base.text
        assert text is not None
        parameters = []
        for prefix, model in text.build(dtype).items():
            layers = text.adapter_layers(prefix, model, self._config.lora_targets)
            parameters += adapter.inject(model, self._config, layers)
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


def _flat(entries: dict[str, Any]) -> dict[str, Any]:
    """bitsandbytes keeps its quantised state in a dict of its own, and reads it back without that too."""
    flat: dict[str, Any] = {}
    for name, value in entries.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _plain_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What an optimizer keeps beside its tensors, as JSON values; not how it computes, which is the machine's.

    JSON has no infinity: Prodigy's ``growth_rate`` is one, a setting that every new optimizer has anyway.
    """
    kinds = (int, float, str, list, tuple, type(None))
    left_out = ("params", "fused", "foreach")
    return [
        {
            name: value
            for name, value in group.items()
            if name not in left_out
            and isinstance(value, kinds)
            and not (isinstance(value, float) and math.isinf(value))
        }
        for group in optimizer.state_dict()["param_groups"]
    ]
