"""Prompts as ComfyUI's CLIP encodes them, with everything that a family's model takes."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.sd import CLIP

from ...trainer.base.conditioning import Conditioning

Conds = dict[str, Any]
"""What a model is called with beside the latents, by name, as ComfyUI's CONDRegular and its like."""


@dataclass(frozen=True, eq=False)
class WiredPrompt:
    """One encoded prompt: ComfyUI's CONDITIONING of one entry, as tensors that autograd accepts."""

    states: torch.Tensor
    options: Mapping[str, Any]
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def encode(cls, clip: CLIP, text: str) -> WiredPrompt:
        """Encode as ComfyUI's CLIPTextEncode does."""
        with torch.inference_mode():
            (states, options), *_ = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        return cls.of(states, options)

    @classmethod
    def of(cls, states: torch.Tensor, options: Mapping[str, Any]) -> WiredPrompt:
        """The first entry of a CONDITIONING."""
        return cls(_kept(states), {name: _kept(value) for name, value in options.items()})

    @property
    def conditioning(self) -> list[Any]:
        """As nodes pass it on."""
        return [[self.states, dict(self.options)]]

    def conds(self, model: Any, noise: torch.Tensor, **options: Any) -> Conds:
        """What this model is called with for one image.

        Args:
            model: ComfyUI's BaseModel, whose ``extra_conds`` knows what its family takes.
            noise: one image's, for the size.
            options: further options of a prompt, such as ``guidance``.
        """
        converted = comfy.sampler_helpers.convert_cond([[self.states, {**self.options, **options}]])
        with torch.no_grad():
            encoded = comfy.samplers.encode_model_conds(model.extra_conds, converted, noise, noise.device, "positive")
        return {
            name: value.process_cond(batch_size=1, device=noise.device, area=None)
            for name, value in encoded[0]["model_conds"].items()
        }


@dataclass(frozen=True)
class WiredConditioning(Conditioning):
    """A batch of prompts, which may be of different lengths."""

    prompts: tuple[WiredPrompt, ...]

    @property
    def tokens(self) -> int:
        """See :class:`trainer.base.conditioning.Conditioning`."""
        return max(prompt.states.shape[1] for prompt in self.prompts)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """See :class:`trainer.base.conditioning.Conditioning`."""
        found = [value for one in self.prompts for value in (one.states, *one.options.values())]
        return tuple(value for value in found if isinstance(value, torch.Tensor))

    def rows(self, first: int, last: int) -> WiredConditioning:
        """See :class:`trainer.base.conditioning.Conditioning`."""
        return WiredConditioning(self.prompts[first:last])

    def to(self, device: torch.device) -> WiredConditioning:
        """Itself: ComfyUI moves a prompt when a model is called with it."""
        return self

    def joined(self, others: Sequence[WiredConditioning]) -> WiredConditioning:
        """See :class:`trainer.base.conditioning.Conditioning`."""
        return WiredConditioning(tuple(prompt for part in (self, *others) for prompt in part.prompts))


def together(rows: Sequence[Conds]) -> list[tuple[int, Conds]]:
    """Adjacent rows that a model takes in one call: how many, and as one batch.

    Attention of image and text together would see a repeated or padded prompt as another one, so only prompts of equal
    length are put together, and what else ComfyUI would.
    """
    groups: list[list[Conds]] = []
    for row in rows:
        if groups and _fit(groups[-1][0], row):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [
        (len(group), {name: value.concat([row[name] for row in group[1:]]) for name, value in group[0].items()})
        for group in groups
    ]


def _fit(one: Conds, other: Conds) -> bool:
    return one.keys() == other.keys() and all(
        value.can_concat(other[name]) and _shape(value) == _shape(other[name]) for name, value in one.items()
    )


def _shape(value: Any) -> Any:
    return tuple(value.cond.shape) if isinstance(value.cond, torch.Tensor) else None


def _kept(value: Any) -> Any:
    """A copy on the CPU that autograd accepts."""
    if not isinstance(value, torch.Tensor):
        return value
    with torch.inference_mode(False):
        kept = value.detach().to("cpu", copy=True).clone()
        return kept.float() if kept.is_floating_point() else kept
