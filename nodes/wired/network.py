"""The connected MODEL as a network to train on: ComfyUI's own module, with a LoRA put on for a run."""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...trainer.errors import SubjectBoothError
from ...trainer.machine.out_of_memory import is_out_of_memory
from ..wired_checks import ATTENTION_OVERRIDE
from .conditioning import Conds
from .kernels import with_backward
from .layers import frozen, is_linear, stand_in_for
from .objective import Objective
from .out_of_place import OutOfPlace

_SEPARATOR = "/"
"""In place of the dots of a layer's path, as the name of a module must not contain any."""

MOST_DIFFERENT = 0.05
"""Of a model's largest output: rounding to bfloat16, in other kernels, over all blocks is less."""

LEAST_WITH_GRADIENT = 0.5
"""Of the layers with a LoRA. Among the families that were tried, it is 0.6 at the least, in models of one block."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class WiredNetwork(nn.Module):
    """Holds the LoRA, and calls the connected model, which it does not own: its weights are no parameters of this.

    The layers of the connected model run through their stand-ins here from the first call until :meth:`take_off`, so
    that whatever calls the model meanwhile, ComfyUI's sampler too, sees the LoRA.

    Args:
        patcher: the connected model.
        objective: its noise process.
        order: a sort key of the layers that can get a LoRA, by their path in the model; None for the model's order.

    Attributes:
        giving_output: returns the sampling object with which ComfyUI's model returns its own output.
        is_checkpointed: whether blocks are computed again in the backward pass.
        is_checked: whether the model is known to say the same when autograd records.
        is_tried: whether the family is known to have gradients; otherwise they are checked, too.
        adapted: the layers that can get a LoRA.
        room: bytes on the device that ComfyUI leaves free beside the model, at least.
    """

    patcher: ModelPatcher
    giving_output: Callable[[], Any]

    def __init__(self, patcher: ModelPatcher, objective: Objective, order: Callable[[str], Any] | None = None) -> None:
        super().__init__()
        self.patcher = patcher
        sampling = objective.giving_output()
        self.giving_output = lambda: sampling  # not as a submodule, whose tables would be this network's
        self.is_checkpointed = False
        self.room = 0
        self.adapted = nn.ModuleDict()
        self.device_mark = nn.Parameter(torch.empty(0), requires_grad=False)  # PEFT asks a parameter for the device
        layers = {
            path: layer
            for path, layer in self.diffusion_model.named_modules()
            if is_linear(layer) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
        }
        for path in sorted(layers, key=order) if order else layers:
            self.adapted[path.replace(".", _SEPARATOR)] = stand_in_for(layers[path])
        self._undo: contextlib.ExitStack | None = None
        self._making_ready = threading.Lock()  # threads that compute images side by side all come here first
        self.is_checked = False
        self.is_tried = True

    @property
    def diffusion_model(self) -> nn.Module:
        """ComfyUI's module."""
        return self.patcher.model.diffusion_model  # type: ignore[no-any-return]

    def layers(self) -> dict[str, nn.Module]:
        """The stand-ins by their name in this module."""
        return {f"adapted.{name}": layer for name, layer in self.adapted.items()}

    @staticmethod
    def path_of(layer: str) -> str:
        """The path in ComfyUI's module of a layer of :meth:`layers`."""
        return layer.removeprefix("adapted.").replace(_SEPARATOR, ".")

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, conds: Conds) -> torch.Tensor:
        """The model's own output, float32 like ``noisy``, whatever it predicts.

        Args:
            noisy: [b, c, ...], the latents as the sampler has them.
            times: sigmas float32 [b].
            conds: for b images, see :func:`nodes.wired.conditioning.together`.
        """
        self.put_on()
        with self._making_ready:
            if torch.is_grad_enabled() and not self.is_checked:
                self._check(noisy, times, conds)
        return self._call(noisy, times, conds)

    def _check(self, noisy: torch.Tensor, times: torch.Tensor, conds: Conds) -> None:
        """Once per run: a model must say the same whether autograd records or not. What is changed in place under two
        names would differ, see :class:`nodes.wired.out_of_place.OutOfPlace`."""
        was_training = self.training
        self.eval()  # without dropout
        try:
            recorded = self._call(noisy, times, conds)
            if not self.is_tried:
                self._check_gradients(recorded)
            recorded = recorded.detach()
            with torch.no_grad():
                plain = self._call(noisy, times, conds)
        finally:
            self.train(was_training)
        difference = float((recorded - plain).abs().max() / plain.abs().max().clamp(min=1e-6))
        if not difference < MOST_DIFFERENT:
            raise _untrainable(f"the model's output differs by {difference:.0%} while gradients are recorded")
        self.is_checked = True

    def _check_gradients(self, output: torch.Tensor) -> None:
        """What ends up in no output has none, as the prompt's part of many a last block, but it is never the most."""
        trained = [p for name, p in self.named_parameters() if p.requires_grad and ".lora_B." in name]
        try:
            found = torch.autograd.grad(output.mean(), trained, allow_unused=True)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise _untrainable(f"a layer of the model has no gradient on {output.device}: {error}") from error
        gradients = [gradient for gradient in found if gradient is not None]
        if len(gradients) < LEAST_WITH_GRADIENT * len(trained):
            raise _untrainable(f"only {len(gradients)} of {len(trained)} layers with a LoRA get a gradient")
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise _untrainable("gradients are not finite in the first step")

    def _call(self, noisy: torch.Tensor, times: torch.Tensor, conds: Conds) -> torch.Tensor:
        options = {"sigmas": times, "cond_or_uncond": [0], ATTENTION_OVERRIDE: _differentiable_attention}
        with OutOfPlace():
            return self._model_giving_output().apply_model(noisy, times, transformer_options=options, **conds).float()

    def _model_giving_output(self) -> Any:
        """ComfyUI's model with another sampling object: a copy of the outermost object only, as threads that compute
        images side by side, and the sampler, call the model too."""
        model = self.patcher.model
        found = copy.copy(model)
        found._modules = {**model._modules, "model_sampling": self.giving_output()}
        return found

    def put_on(self) -> None:
        """Load the model, which ComfyUI may have unloaded to decode images, and put the LoRA on its layers; nothing if
        that is so already."""
        with self._making_ready:
            self._put_on()

    def _put_on(self) -> None:
        is_counted = not isinstance(self.patcher, ModelPatcher)
        if not is_counted and not any(loaded is self.patcher for loaded in comfy.model_management.loaded_models()):
            with torch.inference_mode():
                comfy.model_management.load_models_gpu([self.patcher], memory_required=self.room)
        if self._undo is not None:
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(with_backward())
            for path, layer in self.diffusion_model.named_modules():
                stand_in = self.adapted[name] if (name := path.replace(".", _SEPARATOR)) in self.adapted else None
                if stand_in is not None or isinstance(layer, _CONVOLUTIONS):
                    stack.enter_context(_instead_of_forward(layer, stand_in or _frozen_by(layer)))
                else:
                    stack.enter_context(_differentiable_tables(layer))
            for block in blocks_of(self.diffusion_model):
                stack.enter_context(_instead_of_forward(block, self._block(block)))
            stack.enter_context(_attributes_as_before(self.diffusion_model))
            self._undo = stack.pop_all()

    def take_off(self) -> None:
        """Leave the connected model as it was; repeated calls do nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def _block(self, block: nn.Module) -> Callable[..., Any]:
        """A block's forward pass, which is computed again in the backward pass if that is asked for."""

        def run(*args: Any, **keywords: Any) -> Any:
            with OutOfPlace():  # again, as a thread of autograd may compute it
                return type(block).forward(block, *args, **keywords)

        def forward(*args: Any, **keywords: Any) -> Any:
            if self.is_checkpointed and torch.is_grad_enabled():
                return checkpoint(run, *args, use_reentrant=False, **keywords)
            return type(block).forward(block, *args, **keywords)

        return forward


def _untrainable(given: str) -> SubjectBoothError:
    return SubjectBoothError(
        given,
        "a model whose layers can be differentiated",
        "train on another model, or report this with the name of the model",
        "MODEL",
    )


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a diffusion model: the items of its lists of modules, not of lists inside of these."""
    return [block for those in _lists_of(module) for block in those]


def trained_blocks(module: nn.Module) -> list[str]:
    """The paths of the blocks that can get a LoRA: of the lists that have attention, if any has, as other lists hold
    projections of the prompt or the time, or decode pixels."""
    names = {id(child): path for path, child in module.named_modules()}
    lists = _lists_of(module)
    found = [those for those in lists if any(_has_attention(block) for block in those)] or lists
    return [names[id(block)] for those in found for block in those]


def _lists_of(module: nn.Module) -> list[list[nn.Module]]:
    found: list[list[nn.Module]] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found.append([block for block in child if _has_layers(block)])
        else:
            found += _lists_of(child)
    return found


def _has_attention(block: nn.Module) -> bool:
    return any(_ATTENTION.search(path) for path, _ in block.named_modules())


_ATTENTION = re.compile(
    r"attn|attention|(^|\.)((to_|add_)?(q|k|v|qkv)(_proj)?|w[qkvo]|to_out|out_proj)(\.|$)"
    r"|^linear[12]$"  # of Flux' single blocks: attention and MLP in one
)
_MODULATION = re.compile(r"(^|[._])(mod|modulation|ada_?ln)|_mod(\.|$)|(^|[._])norm\d*\.", re.IGNORECASE)
"""Layers that scale and shift by the time, also the input of attention."""
_BETWEEN = re.compile(r"(^|\.)(emb_layers|proj_in|proj_out|skip_connection|skip_linear)(\.|$)")
"""Layers that lead in and out of a block and its parts."""


def is_among(path: str, lora_targets: str) -> bool:
    """Whether a layer of a block gets a LoRA, by its path in the block.

    Args:
        lora_targets: ``attention``; ``attention+mlp``; ``all``.
    """
    if lora_targets == "all":
        return True
    if _MODULATION.search(path):
        return False
    return bool(_ATTENTION.search(path)) or (lora_targets != "attention" and not _BETWEEN.search(path))


def _has_layers(block: nn.Module) -> bool:
    return any(is_linear(layer) or isinstance(layer, _CONVOLUTIONS) for layer in block.modules())


def _frozen_by(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x, *_: frozen(layer, x)


@contextlib.contextmanager
def _instead_of_forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    had = layer.__dict__.get("forward")
    object.__setattr__(layer, "forward", forward)
    try:
        yield
    finally:
        if had is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = had


@contextlib.contextmanager
def _attributes_as_before(module: nn.Module) -> Iterator[None]:
    """Afterwards, no layer holds a tensor of the last step: some models note their inputs, and with these all that was
    computed for them."""
    before = {id(layer): dict(layer.__dict__) for layer in module.modules()}
    try:
        yield
    finally:
        for layer in module.modules():
            for name, value in list(layer.__dict__.items()):
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    del layer.__dict__[name]
                    if name in before[id(layer)]:
                        layer.__dict__[name] = before[id(layer)][name]


@contextlib.contextmanager
def _differentiable_tables(layer: nn.Module) -> Iterator[None]:
    """Inside, a module's own parameters and buffers are copies that autograd may keep: of norms and other small tables.
    ComfyUI makes them in inference mode."""
    kept: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    with torch.inference_mode(False):
        own: list[dict[str, Any]] = [layer._parameters, layer._buffers]
        for tensors in own:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    kept.append((tensors, name, tensor))
                    copy = tensor.clone()
                    tensors[name] = nn.Parameter(copy, requires_grad=False) if tensors is layer._parameters else copy
    try:
        yield
    finally:
        for tensors, name, tensor in kept:
            tensors[name] = tensor


def _differentiable_attention(kernel: Any, *args: Any, **keywords: Any) -> torch.Tensor:
    """In place of the attention that ComfyUI was started with, of which some have no backward pass."""
    return attention_pytorch(*args, **keywords)  # type: ignore[no-any-return]
