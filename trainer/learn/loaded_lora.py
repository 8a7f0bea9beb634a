"""Puts a LoRA file onto modules, to be switched on and off: the inverse of :func:`trainer.learn.adapter.to_file`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import SubjectBoothError

_DOWN, _UP, _ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


@dataclass(frozen=True)
class Layer:
    """A layer of a LoRA file.

    Attributes:
        down: float32 [rank, in], of a convolution [rank, in, kh, kw].
        up: float32 [out, rank], of a convolution [out, rank, 1, 1].
        scale: alpha / rank; 1 without an alpha.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float


def layers_of_file(tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, Layer]:
    """The layers of a LoRA by their key.

    Args:
        tensors: under kohya's keys, from :func:`trainer.runs.lora_reader.read_lora`.
        where: the file's name, for messages.

    Raises:
        SubjectBoothError: a layer is incomplete, or of another kind than LoRA (LoHa, LoKr, DoRA, ...).
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, kind = name.partition(".")
        if kind not in (_DOWN, _UP, _ALPHA):
            raise SubjectBoothError(
                f"the tensor {name[:100]!r} is not part of a plain LoRA",
                "lora_down, lora_up and alpha under kohya's names",
                "evaluate a LoRA of Stable Diffusion 1.x, 2.x or SDXL that was saved by SubjectBooth, kohya's scripts "
                "or diffusers",
                where,
            )
        parts.setdefault(key, {})[kind] = tensor.float()
    layers = {}
    for key, found in parts.items():
        down, up = found.get(_DOWN), found.get(_UP)
        if down is None or up is None or min(down.dim(), up.dim()) < 2 or up.shape[1] != down.shape[0]:
            raise SubjectBoothError(
                f"the layer {key[:100]!r} of the LoRA is incomplete",
                "lora_down [rank, in] and lora_up [out, rank]",
                "download or train the LoRA again",
                where,
            )
        rank = down.shape[0]
        layers[key] = Layer(down, up, float(found.get(_ALPHA, torch.tensor(float(rank)))) / rank)
    return layers


@dataclass
class LoadedLora:
    """A LoRA on some modules. Starts switched off.

    Attributes:
        layers: from :func:`layers_of_file`.
        where: the file's name, for messages.
        is_on: whether the modules compute with the LoRA.
    """

    layers: Mapping[str, Layer]
    where: str
    is_on: bool = False
    _used: set[str] = field(default_factory=set)

    def put_on(self, module: nn.Module, keys_of: Callable[[str], Iterable[str]]) -> None:
        """Add the LoRA to the module's layers that the file contains, by forward hooks: the weights stay as they are.

        Args:
            module: a network or text encoder, in any dtype. The LoRA computes in float32, as in training.
            keys_of: a layer's possible keys in a file, by its name in the module.

        Raises:
            SubjectBoothError: a layer has another shape.
        """
        for name, layer in module.named_modules():
            if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                continue
            for key in keys_of(name):
                if key in self.layers:
                    self._used.add(key)
                    layer.register_forward_hook(self._hook(key, layer))
                    break

    def check_used(self) -> None:
        """Check that the whole file is on the modules.

        Raises:
            SubjectBoothError: some of its layers are on none.
        """
        unknown = [key for key in self.layers if key not in self._used]
        if unknown:
            raise SubjectBoothError(
                f"{len(unknown)} of the LoRA's {len(self.layers)} layers are not in the base, such as "
                f"{unknown[0][:100]!r}",
                "the base that the LoRA was trained on, or one of its family",
                "choose another base or LoRA",
                self.where,
            )

    def _hook(self, key: str, layer: nn.Linear | nn.Conv2d) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        stored = self.layers[key]
        down, up = stored.down, stored.up
        # A 1x1 convolution and a linear layer are saved in either shape.
        is_linear = isinstance(layer, nn.Linear)
        down = _shaped(down, is_linear)
        up = _shaped(up, is_linear)
        expected = layer.weight.shape
        if (up.shape[0], *down.shape[1:]) != tuple(expected) or (not is_linear and up.shape[2:] != (1, 1)):
            raise SubjectBoothError(
                f"the layer {key[:100]!r} of the LoRA is {tuple(stored.up.shape)} x {tuple(stored.down.shape)}",
                f"one for weights of shape {tuple(expected)}",
                "use the base that the LoRA was trained on, or one of its family",
                self.where,
            )
        moved: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

        def add(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            if not self.is_on:
                return None
            x = inputs[0].float()
            if x.device not in moved:
                moved[x.device] = down.to(x.device), up.to(x.device)
            a, b = moved[x.device]
            if isinstance(layer, nn.Conv2d):
                low = F.conv2d(x, a, None, layer.stride, layer.padding, layer.dilation)
                change = F.conv2d(low, b)
            else:
                change = F.linear(F.linear(x, a), b)
            return output + (change * stored.scale).to(output.dtype)

        return add


def _shaped(weight: torch.Tensor, is_linear: bool) -> torch.Tensor:
    if is_linear and weight.dim() == 4 and weight.shape[2:] == (1, 1):
        return weight[:, :, 0, 0]
    return weight[:, :, None, None] if not is_linear and weight.dim() == 2 else weight
