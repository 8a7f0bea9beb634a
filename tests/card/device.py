"""A pretended card, so that the trainer can be rehearsed at full size on a machine without a GPU.

torch lets Python register a device. Here its tensors are fake ones (``FakeTensorMode``): they have a shape, a dtype and
a device, and no content. So a full-size SDXL trains in seconds, an operation that mixes devices raises as it does on a
GPU, and :class:`tests.card.counting.Counting` sees every operation.

What is on the CPU stays real (the draws of noise, photos and timesteps are data that decide what happens next), except
inside :meth:`Card.unreal_cpu`, where full-size weights are made that would take gigabytes.

What it cannot show: speed, rounding, kernels that fail, memory that fragments. A number that the host reads from the
card is 0, a truth value is true.

Registering a device cannot be undone, and torch starts the threads of the backward pass once for the devices it has by
then: use it in a process of its own, before any backward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

NAME = "npu"
"""accelerate allows fp16 on devices of certain names only; of those, torch leaves this one to devices from outside."""
CARD = torch.device("privateuseone", 0)  # which is its name until it is registered
ATEN = torch.ops.aten

_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
# What CUDA's autocast computes in half and in float32 (pytorch.org/docs/stable/amp.html), as far as it comes up here.
_IN_HALF = (
    ATEN.linear.default,
    ATEN.matmul.default,
    ATEN.mm.default,
    ATEN.bmm.default,
    ATEN.addmm.default,
    ATEN.baddbmm.default,
    ATEN.conv2d.default,
    ATEN.conv2d.padding,
)
_IN_FLOAT = (
    ATEN.layer_norm.default,
    ATEN.group_norm.default,
    ATEN.softmax.int,
    ATEN.mse_loss.default,
    ATEN.pow.Tensor_Scalar,
    ATEN.sum.default,
    ATEN.sum.dim_IntList,
)

_READS = (ATEN._local_scalar_dense.default, ATEN.item.default, ATEN.is_nonzero.default)
"""A number for the host; the last two in inference mode."""

_casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
"""autocast's copies of the weights, which it keeps until it ends: by id, the weight and its copy."""
_libraries: list[torch.library.Library] = []


def register() -> None:
    """Make the device known to torch. Once a process."""
    from torch.utils import backend_registration

    if _libraries:
        return

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for operator in _IN_HALF:
        aten.impl(operator, _autocast(operator, None), "AutocastPrivateUse1")
    for operator in _IN_FLOAT:
        aten.impl(operator, _autocast(operator, torch.float32), "AutocastPrivateUse1")
    # It has a kernel on CUDA; for a device that torch does not know it would be eight operations.
    aten.impl("silu_backward", ATEN.silu_backward.default, "PrivateUse1")
    _libraries.extend([everything, aten])


def _autocast(operator: Any, dtype: torch.dtype | None) -> Any:
    def cast(tensor: Any, to: torch.dtype) -> Any:
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.dtype == to:
            return tensor
        if to == torch.float32 or not (torch.is_autocast_cache_enabled() and tensor.requires_grad and tensor.is_leaf):
            return tensor.to(to)
        if id(tensor) not in _casts:
            _casts[id(tensor)] = tensor, tensor.to(to)
        return _casts[id(tensor)][1]

    def run(*arguments: Any, **keywords: Any) -> Any:
        to = dtype or torch.get_autocast_dtype(NAME)
        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            return operator(*(cast(argument, to) for argument in arguments), **keywords)

    return run


class Card(TorchDispatchMode):
    """Inside, the device :data:`CARD` is there.

    Args:
        capacity: bytes; an allocation beyond them fails as on a GPU. None has room for everything.
    """

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        register()
        self.capacity = capacity
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._unreal = threading.local()
        self._leaving = ExitStack()

    def __enter__(self) -> Card:
        for context in (
            self._fake,
            mock.patch.multiple(torch, clear_autocast_cache=_casts.clear),
            _for_fakes(),
            _for_accelerate(),
        ):
            self._leaving.enter_context(context)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._leaving.close()
        _casts.clear()

    @contextmanager
    def unreal_cpu(self) -> Iterator[None]:
        """Inside, new tensors on the CPU have no content either."""
        self._unreal.on = True
        try:
            yield
        finally:
            self._unreal.on = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs) if kwargs else args)
        if not (any(isinstance(tensor, FakeTensor) for tensor in given) or self._makes_fake(kwargs, given)):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function in _READS:
            self.host_reads(given[0])
            return self._number(function, given[0])
        if not all(isinstance(tensor, FakeTensor) for tensor in given):
            args, kwargs = tree_map_only(torch.Tensor, self._faked, (args, kwargs))
        return self.run(function, args, kwargs, given)

    @staticmethod
    def _number(function: Any, tensor: torch.Tensor) -> float | bool:
        if function is ATEN.is_nonzero.default:
            return tensor.dtype == torch.bool
        return 0.0 if tensor.is_floating_point() else tensor.dtype == torch.bool

    def _makes_fake(self, kwargs: dict[str, Any], given: list[torch.Tensor]) -> bool:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == NAME:
            return True
        if not getattr(self._unreal, "on", False) or any(tensor.is_meta for tensor in given):
            return False
        return device is None or torch.device(device).type != "meta"

    def run(self, function: Any, args: Any, kwargs: Any, given: list[torch.Tensor]) -> Any:
        """One operation on fake tensors; *given* are those among its arguments."""
        return function(*args, **kwargs)

    def host_reads(self, tensor: torch.Tensor) -> None:
        """The host asks for a number of a fake tensor."""

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        # Not FakeTensorMode.from_tensor(), whose memory of the real tensor keeps a module from moving it.
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def tensors_in(values: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dictionaries. (torch's own way takes longer than all else here.)"""
    found: list[torch.Tensor] = []
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list, dict)):
            found += tensors_in(value)
    return found


def on_card(tensor: torch.Tensor) -> bool:
    """Whether it is there."""
    return tensor.device.type == NAME


@contextmanager
def _for_fakes() -> Iterator[None]:
    """Let torch treat fake tensors as it treats those of a GPU."""
    from torch.utils import _foreach_utils

    def fused_attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **keywords: Any,
    ) -> Any:
        # The kernel that torch takes on a GPU; by itself it takes the one for unknown devices, of plain products.
        if torch.is_autocast_enabled(NAME):
            half = torch.get_autocast_dtype(NAME)
            query, key, value = (each.to(half) for each in (query, key, value))
        if not on_card(query):
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **keywords)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        keeps = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
        return ATEN._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale
        )[0]

    def swap(first: torch.Tensor, second: torch.Tensor) -> None:
        """torch.utils.swap_tensors(), by which a moved module keeps its parameters. That refuses tensors which anything
        refers to weakly, as FakeTensorMode does to all that it makes."""
        first.__class__, second.__class__ = second.__class__, first.__class__
        first.__dict__, second.__dict__ = second.__dict__, first.__dict__
        torch._C._swap_tensor_impl(first, second)

    def tensor(data: Any, **keywords: Any) -> torch.Tensor:
        """torch.tensor() copies to the device past every mode."""
        device = keywords.pop("device", None)
        made = plain_tensor(data, **keywords)
        return made if device is None else made.to(device)

    plain, plain_tensor = torch.nn.functional.scaled_dot_product_attention, torch.tensor
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    _foreach_utils._foreach_supported_types.append(FakeTensor)
    try:
        with (
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention),
            mock.patch.object(torch.utils, "swap_tensors", swap),
            mock.patch.object(torch, "tensor", tensor),
        ):
            yield
    finally:
        _foreach_utils._foreach_supported_types.remove(FakeTensor)
        torch.__future__.set_swap_module_params_on_conversion(before)


@contextmanager
def _for_accelerate() -> Iterator[None]:
    """Let accelerate find the card as it finds a GPU."""
    import accelerate.accelerator
    import accelerate.state

    with (
        mock.patch.object(accelerate.state.PartialState, "default_device", CARD),
        mock.patch.object(accelerate.accelerator, "is_bf16_available", lambda *_: True),
        mock.patch.object(
            accelerate.accelerator, "get_grad_scaler", lambda *_, **keywords: torch.amp.GradScaler(NAME, **keywords)
        ),
    ):
        yield
