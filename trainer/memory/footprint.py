"""Counts the memory of a training step's activations without running the step.

The network runs one forward pass on torch's meta device, where tensors have a shape but no content, and the bytes that
autograd keeps for the backward pass are counted. This works for every family, set of LoRA layers, resolution and prompt
length, without fitted coefficients. Identical blocks are counted once, so that SDXL's 70 transformer blocks take
seconds instead of a minute.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.conditioning import Conditioning
from ..base.denoiser import Denoiser

META = torch.device("meta")


@dataclass(frozen=True)
class Footprint:
    """Peak bytes of one image's forward and backward pass.

    Attributes:
        whole: without gradient checkpointing.
        checkpointed: with gradient checkpointing, which keeps the blocks' inputs and recomputes one block at a time.
    """

    whole: int
    checkpointed: int


def training_footprint(
    denoiser: Denoiser, network: nn.Module, conditioning: Conditioning, size: tuple[int, int], dtype: torch.dtype
) -> Footprint:
    """Count one image's activations; a batch takes proportionally more.

    Args:
        denoiser: the denoiser of the network.
        network: the network with its LoRA. Only its shapes are read, and it is not changed.
        conditioning: a prompt for training, batch size 1.
        size: height and width of the latents.
        dtype: dtype of the forward pass.
    """
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as undo:
        undo.enter_context(denoiser.countable(network))
        weights = weights_on_meta(_Bare(network), dtype)
        memory = Memory(weights)
        units = undo.enter_context(_counted_once(denoiser.blocks(network), memory))
        latents, prompt = inputs_on_meta(denoiser, conditioning, size)
        stand_in = _OnMeta(network, weights, dtype)
        undo.enter_context(memory)
        times = times_on_meta(denoiser)
        loss = (denoiser.predict(stand_in, latents, times, prompt) - latents).square().mean()
        whole = memory.live
        del loss
    most = max((unit.peak for unit, _ in units), default=0)
    # The backward pass peaks within one block; the activations of the blocks after it are already freed by then.
    extra = max((unit.peak - unit.kept for unit, _ in units if unit.peak == most), default=0)
    return Footprint(whole + extra, _checkpointed(units, whole))


def _checkpointed(units: list[tuple[_Unit, int]], whole: int) -> int:
    """The peak if each block keeps only its input, and is recomputed in the backward pass.

    By then the activations of all later blocks are freed. A block without checkpointing may not keep its input.

    Args:
        units: the blocks in order, and the bytes alive before each without checkpointing.
        whole: the bytes alive at the end of the forward pass.
    """
    saved, peak = 0, 0
    for unit, before in units:
        held = 0 if unit.keeps_input else unit.input
        peak = max(peak, before - saved + held + unit.peak)
        saved += unit.kept - unit.output - held
    return max(peak, whole - saved)


def drawing_bytes(
    denoiser: Denoiser, network: nn.Module, conditioning: Conditioning, size: tuple[int, ...], dtype: torch.dtype
) -> int:
    """Peak bytes of one image's forward pass without gradients; arguments as in :func:`training_footprint`."""
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        network = undo.enter_context(denoiser.countable(network))
        weights = weights_on_meta(_Bare(network), dtype)
        memory = Memory(weights)
        latents, prompt = inputs_on_meta(denoiser, conditioning, size)
        undo.enter_context(memory)
        denoiser.predict(_OnMeta(network, weights, dtype), latents, times_on_meta(denoiser), prompt)
        return memory.peak


def inputs_on_meta(
    denoiser: Denoiser, conditioning: Conditioning, size: tuple[int, ...]
) -> tuple[torch.Tensor, Conditioning]:
    """One image's latents and its prompt, on the meta device."""
    return torch.empty(1, denoiser.latent_channels, *size, device=META), conditioning.to(META)


def times_on_meta(denoiser: Denoiser) -> torch.Tensor:
    """One image's time."""
    return denoiser.times(torch.zeros(1, dtype=torch.float64)).to(META)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def weights_on_meta(module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Stand-ins for a module's parameters and buffers, by name, for ``torch.func.functional_call``."""
    return {name: _meta(tensor, dtype) for name, tensor in _tensors(module)}


def _meta(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    made = torch.empty(tensor.shape, device=META, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
    return made.requires_grad_(tensor.requires_grad)


class _Bare(nn.Module):
    """Calls the network without the hooks that other code may have added."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.network.forward(*arguments, **keywords)


class _OnMeta:
    """The network with weights on the meta device, for :meth:`trainer.base.denoiser.Denoiser.predict`."""

    def __init__(self, network: nn.Module, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        self._bare, self._weights, self._dtype = _Bare(network), weights, dtype

    def parameters(self) -> Iterator[torch.Tensor]:
        yield torch.empty(0, device=META, dtype=self._dtype)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return torch.func.functional_call(self._bare, self._weights, arguments, keywords)


class Memory(TorchDispatchMode):
    """Counts the bytes of live tensors other than the weights."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in weights.values()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:  # else a view of a counted tensor
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


@dataclass(frozen=True)
class _Unit:
    """Bytes of a block.

    Attributes:
        kept: allocated by its forward pass and still alive after it, output included.
        output: its output.
        peak: the peak during its forward and backward pass, above what was alive before.
        input: its input; 0 if it keeps nothing.
        keeps_input: whether its backward pass needs the input itself, not only what was made of it.
    """

    kept: int
    output: int
    peak: int
    input: int
    keeps_input: bool


class _Kept(torch.autograd.Function):
    """Stands in for a block that was already counted: keeps as much memory, and returns an output of the same shape."""

    @staticmethod
    def forward(
        context: Any,
        hidden_states: torch.Tensor,
        unit: _Unit,
        shape: torch.Size,
        dtype: torch.dtype,
        trained: torch.Tensor,
    ) -> torch.Tensor:
        context.save_for_backward(
            torch.empty(unit.kept - unit.output, dtype=torch.uint8, device=META),
            *([hidden_states] if unit.keeps_input else []),
        )
        return torch.empty(shape, dtype=dtype, device=META)


@contextmanager
def _counted_once(blocks: list[nn.Module], memory: Memory) -> Iterator[list[tuple[_Unit, int]]]:
    """Inside, each block's memory is counted, along with the bytes alive before it; a block identical to an earlier one
    does not run."""
    units: list[tuple[_Unit, int]] = []
    known: dict[Any, tuple[_Unit, torch.Size, torch.dtype, bool]] = {}

    def counted(block: nn.Module) -> Any:
        forward = block.forward
        layout = (type(block), tuple((name, tensor.shape, tensor.requires_grad) for name, tensor in _tensors(block)))

        def count(hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            others = [value for value in (*arguments, *keywords.values()) if isinstance(value, torch.Tensor)]
            key = (layout, *((value.shape, value.dtype, value.requires_grad) for value in (hidden_states, *others)))
            if key not in known:
                before = memory.live
                peak = _peak(forward, memory, hidden_states, *arguments, **keywords)
                given, kept = hidden_states.untyped_storage(), []

                def keep(tensor: torch.Tensor) -> torch.Tensor:
                    kept.append(tensor.untyped_storage()._cdata == given._cdata)
                    return tensor

                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    output = forward(hidden_states, *arguments, **keywords)
                unit = _Unit(
                    memory.live - before,
                    output.untyped_storage().nbytes(),
                    peak,
                    given.nbytes() if kept else 0,
                    any(kept),
                )
                known[key] = (unit, output.shape, output.dtype, output.requires_grad)
                units.append((unit, before))
                return output
            unit, shape, dtype, trained = known[key]
            units.append((unit, memory.live))
            return _Kept.apply(hidden_states, unit, shape, dtype, torch.empty(0, device=META, requires_grad=trained))

        return count

    try:
        for block in blocks:
            block.forward = counted(block)  # type: ignore[method-assign]
        yield units
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _peak(forward: Any, memory: Memory, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> int:
    """Peak bytes of one block's forward and backward pass."""
    before = memory.peak = memory.live
    given = hidden_states.detach().requires_grad_(hidden_states.requires_grad)
    output = forward(given, *arguments, **keywords)
    if given.requires_grad:
        torch.autograd.grad(output, [given], torch.empty_like(output))
    return memory.peak - before
