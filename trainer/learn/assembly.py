"""What is trained, put together: UNet and text encoders with their LoRA, the optimizer, and accelerate around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..base.base_model import BaseModel
from ..base.conditioning import Conditioning, concatenate
from ..base.sd.text_encoder import TokenChunks, encode, lora_layer_name, used_layers
from ..config import TrainConfig
from ..machine.attention import choose_attention, use_attention
from ..machine.numerics import DTYPES
from ..machine.out_of_memory import free_bytes
from ..machine.runtime import OwnAccelerate, accelerate_precision, choose
from ..memory.plan import FreeMemory, Load, Plan, make_plan
from . import adapter
from .checkpoint import Checkpoint
from .ema import AdapterAverage
from .optimizers import make_optimizer, usable_optimizer


class Assembly:
    """The trained modules of one run.

    Args:
        base: what is trained on; its UNet (and text encoders) are built here.
        config: the requested settings.
        device: where to train; None lets accelerate choose.
        resume: weights and optimizer state to go on with.
        load: what one step takes in.
        free_memory: bytes free on a device; None asks torch and the system.

    Attributes:
        unet: the UNet as accelerate wraps it.
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
    ) -> None:
        from accelerate import Accelerator
        from accelerate.utils import AutocastKwargs

        self._base, self._config = base, config
        self._accelerate = OwnAccelerate(device)
        self.device = device or self._accelerate.device()
        # A resumed run keeps what was chosen at its start: another precision would give other weights.
        kept = resume.chosen if resume else {}
        found, self.notes = choose(config, self.device, kept.get("precision"))
        self.chosen = {"optimizer": config.optimizer, **kept, **found}
        precision = self.chosen["precision"]
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
        self._modules: dict[str, Any] = {"unet": base.build_unet(DTYPES[precision])}
        unet_parameters = adapter.inject(self._modules["unet"], config)
        text_parameters = self._add_text_encoders(DTYPES[precision]) if config.train_text_encoder else []
        self.parameters = unet_parameters + text_parameters
        for module in self._modules.values():
            module.train()  # diffusers checkpoints activations in train mode only; the base has no dropout
        self._groups = unet_parameters, text_parameters
        asked = self.chosen["optimizer"]
        self.chosen["optimizer"], missing = usable_optimizer(asked, self.device)
        self.plan = self._make_plan(kept, load, free_memory or free_bytes)
        self.chosen |= self.plan.chosen
        for module in self._modules.values():
            module.to(self.device)
        if resume:
            resume = adapter.without_unused_layers(resume, self._modules)
            self._load(resume.adapter)
        self.apply_memory_settings()
        self._use_attention()
        self._optimizer, notes = self._make_optimizer()
        self.notes += tuple(note for note in (missing, *notes, self.plan.warning) if note)
        self._average = AdapterAverage(self.parameters, config.ema_decay) if config.ema_decay else None
        if resume and self._average:
            self._average.average = [tensor.to(self.device) for tensor in resume.average]
        if resume and self.chosen["optimizer"] == resume.chosen.get("optimizer", asked):
            self._resume_optimizer(resume)
        with self._accelerate.installed():
            prepared = self.accelerator.prepare(*self._modules.values(), self._optimizer)
        self.unet, *self._text_encoders, self.optimizer = prepared
        if resume and resume.scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(resume.scaler)
        self._tokens: dict[str, tuple[TokenChunks, ...]] = {}
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
        assert self._base.tokenize is not None
        for prompt in prompts:
            if prompt not in self._tokens:
                self._tokens[prompt] = self._base.tokenize(prompt)
        unique = list(dict.fromkeys(prompts))
        with torch.set_grad_enabled(learn):
            return dict(
                zip(
                    unique,
                    encode(
                        self._text_encoders,
                        self._base.family.text_encoders,
                        [self._tokens[prompt] for prompt in unique],
                        self._base.clip_layer,
                    ),
                    strict=True,
                )
            )

    def apply_memory_settings(self) -> None:
        """Bring the modules into line with :attr:`chosen`, which a step-down may have changed."""
        if self.chosen["gradient_checkpointing"] == "on":
            self._modules["unet"].enable_gradient_checkpointing()

    def use_chosen_optimizer(self) -> None:
        """Go on with another optimizer, from the adapter as it is; its own averages start anew."""
        self._optimizer, _ = self._make_optimizer()
        # Gradients of fp16 are unscaled once for every optimizer that accelerate knows.
        self.accelerator._optimizers.clear()
        with self._accelerate.installed():
            self.optimizer = self.accelerator.prepare(self._optimizer)

    def _use_attention(self) -> None:
        # Chosen anew on every machine: kernels differ by rounding only.
        attention, missing = choose_attention(self._config.attention, self.device)
        self.chosen["attention"], unusable = use_attention(self._modules["unet"], attention)
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
            states = {name: adapter.adapter_state(module) for name, module in self._modules.items()}
        file = adapter.to_kohya(states.pop("unet"), "lora_unet", alpha, self._base.layer_names)
        for shape in self._base.family.text_encoders if self._text_encoders else ():
            state = {lora_layer_name(name): tensor for name, tensor in states[shape.prefix].items()}
            file |= adapter.to_kohya(state, shape.prefix, alpha)
        return file

    def snapshot(self, step: int, losses: list[list[float | None]]) -> Checkpoint:
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
            for name, module in self._modules.items()
            for key, tensor in adapter.adapter_state(module).items()
        }
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else {}
        average = [tensor.cpu().clone() for tensor in self._average.average] if self._average else []
        return Checkpoint(
            step, weights, optimizer, list(losses), self.chosen, _plain_groups(self._optimizer), average, scaler
        )

    def close(self) -> None:
        """Let accelerate drop its references to the model."""
        self.accelerator.free_memory()

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, tuple[str, ...]]:
        return make_optimizer(*self._groups, replace(self._config, optimizer=self.chosen["optimizer"]), self.device)

    def _make_plan(self, kept: dict[str, str], load: Load, free_memory: FreeMemory) -> Plan:
        unet, *text_encoders = self._modules.values()
        free = free_memory(self.device)
        if free is not None and self.device.type == "cpu":  # the weights lie there already
            free += sum(tensor.nbytes for module in self._modules.values() for tensor in module.parameters())
        return make_plan(
            self._config,
            {name: self.chosen[name] for name in ("precision", "optimizer")},
            kept,
            unet,
            text_encoders,
            self._base.family,
            load,
            free,
        )

    def _add_text_encoders(self, dtype: torch.dtype) -> list[torch.nn.Parameter]:
        assert self._base.build_text_encoders is not None
        parameters = []
        models = self._base.build_text_encoders(dtype)
        for shape, model in zip(self._base.family.text_encoders, models, strict=True):
            targets = partial(adapter.text_target_layers, used=used_layers(shape, self._base.clip_layer))
            parameters += adapter.inject(model, self._config, targets)
            self._modules[shape.prefix] = model
        return parameters

    def _load(self, weights: dict[str, torch.Tensor]) -> None:
        for name, module in self._modules.items():
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
