"""Gradients on the connected model beside those of a plain copy of it, whose weights autograd keeps."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.quant_ops
import torch

from .predictions import pack_module


class ProbeWiredGradients:
    """One step's gradients, as the trainer computes them and by a plain fp32 copy with hooks, and copies of weights.

    The copy is of `model`, or of `plain` where the module of `model` cannot be copied.
    """

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        wired = {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",)}
        return {
            "required": {**wired, "checkpointing": ("BOOLEAN", {"default": False}), "nonce": ("INT", {"default": 0})},
            "optional": {"plain": ("MODEL",)},
        }

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(
        self, model: Any, clip: Any, vae: Any, checkpointing: bool, nonce: int, plain: Any = None
    ) -> dict[str, Any]:
        adapter, config = pack_module("trainer.learn.adapter"), pack_module("trainer.config")
        with torch.inference_mode(False), torch.enable_grad():
            base = pack_module("nodes.wired.base").wired_base(model, clip, vae)
            denoiser = base.denoiser
            network = denoiser.build(torch.float32)
            own = {name: layer.weight for name, layer in network.diffusion_model.named_modules() if _is_linear(layer)}
            targets = [denoiser.adapter_layers(network, which) for which in ("attention", "attention+mlp", "all")]
            adapter.inject(network, config.TrainConfig(rank=4, network_alpha=4.0), targets[-1])
            random = torch.Generator().manual_seed(1)
            pairs = {}
            for layer in adapter.lora_layers(network):
                down, up = (getattr(layer, f"lora_{part}")[adapter.ADAPTER_NAME].weight for part in "AB")
                with torch.no_grad():
                    up.copy_(torch.randn(up.shape, generator=random) * 0.02)
                pairs[id(layer.get_base_layer().wired)] = down, up
            if checkpointing:
                denoiser.enable_gradient_checkpointing(network)
            texts = base.prompts.encode(["a photo of ohwx cat", "a dog", "a cat"])
            text = texts[0].joined(texts[1:])
            latents, noise = (torch.randn(3, *denoiser.latent_size(128, 128), generator=random) for _ in "xn")
            times = denoiser.times(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))
            noisy, target = (f(latents, noise, times) for f in (denoiser.noisy_latents, denoiser.target))
            with mock.patch.object(pack_module("nodes.wired.objective"), "_DOUBLE", ()):  # as on Apple's devices
                same_target = torch.equal(denoiser.target(latents, noise, times), target)
            layers = dict(network.diffusion_model.named_modules())
            planned, real = 0, 0
            if not checkpointing:
                planned, real = _memory(denoiser, network, texts[0], noisy[:1], times[:1])
            # Some models note what they computed, and must not keep it.
            noting = network.diffusion_model.register_forward_hook(lambda made, _, found: setattr(made, "noted", found))
            with _attention_without_backward():
                loss = (denoiser.predict(network, noisy, times, text) - target).square().mean()
                copies = _copies(list(own.values()))
                loss.backward()
                denoiser.release(network)
            noting.remove()
            ours = {key: [part.grad.clone() for part in pair if part.grad is not None] for key, pair in pairs.items()}
            for pair in pairs.values():
                for part in pair:
                    part.grad = None
            left = _left(model.model)
            by_name = {name: pairs[id(layer)] for name, layer in layers.items() if id(layer) in pairs}
            plain_loss = _plain_loss(model, plain or model, denoiser, network, by_name, (noisy, times, text, target))
            differences = []
            for key, pair in pairs.items():
                theirs = [part.grad for part in pair if part.grad is not None]
                assert len(theirs) == len(ours[key]), "the same layers have a gradient"
                differences += [
                    float((one - other).abs().max() / (other.abs().max() + 1e-9))
                    for one, other in zip(ours[key], theirs, strict=True)
                ]
        report = {
            "loss": loss.item(),
            "plain_loss": plain_loss,
            "difference": max(differences),
            "layers": len(pairs),
            "targets": [len(found) for found in targets],
            "nested": targets[0].keys() <= targets[1].keys() <= targets[2].keys(),
            "middle": float(times[1]),
            "same_target": same_target,
            "with_gradient": sum(bool(found) for found in ours.values()),
            "copies": copies,
            "left": left,
            "planned": planned,
            "real": real,
        }
        return {"ui": {"report": [report]}}


def _memory(denoiser: Any, network: Any, text: Any, noisy: torch.Tensor, times: torch.Tensor) -> tuple[int, int]:
    """Peak bytes of one image's forward and backward pass, as planned and with real tensors."""
    footprint, whole_step = pack_module("trainer.memory.footprint"), pack_module("trainer.memory.whole_step")
    planned = whole_step.step_footprint(denoiser, network, text, noisy.shape[2:], torch.float32).whole
    own = [*network.named_parameters()]
    own += [*network.diffusion_model.named_parameters(), *network.diffusion_model.named_buffers()]
    denoiser.predict(network, noisy, times, text)  # the first time, more is computed
    with footprint.Memory({str(number): tensor for number, (_, tensor) in enumerate(own)}) as memory:
        loss = denoiser.predict(network, noisy, times, text).square().mean()
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        torch.autograd.grad(loss, trained, allow_unused=True)
    denoiser.release(network)
    return planned, memory.peak


@contextlib.contextmanager
def _attention_without_backward() -> Iterator[None]:
    """Inside, ComfyUI is as if it was started with an attention that has no backward pass, such as SageAttention."""
    attention = comfy.ldm.modules.attention

    @attention.wrap_attn  # type: ignore[untyped-decorator]
    def chosen(*args: Any, **keywords: Any) -> torch.Tensor:
        with torch.no_grad():
            return attention.attention_pytorch(*args, **keywords)  # type: ignore[no-any-return]

    own = attention.optimized_attention
    found = [
        (module, name)
        for module in list(sys.modules.values())
        for name in ("optimized_attention", "optimized_attention_masked")
        if getattr(module, "__dict__", {}).get(name) is own
    ]
    for module, name in found:
        setattr(module, name, chosen)
    try:
        yield
    finally:
        for module, name in found:
            setattr(module, name, own)


def _left(model: Any) -> list[str]:
    """What a run left at the modules of the connected model."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if name == "forward" or (isinstance(value, torch.Tensor) and value.requires_grad)
    ]


def _is_linear(layer: Any) -> bool:
    return isinstance(layer, torch.nn.Linear)


def _copies(weights: list[torch.Tensor]) -> int:
    """Float tensors of the shape of a weight that are neither it nor share its memory; small ones do not count."""
    shapes = {weight.shape for weight in weights if weight.numel() >= 128 * 128}
    memory = {weight.untyped_storage().data_ptr() for weight in weights}
    return sum(
        1
        for thing in gc.get_objects()
        if type(thing) in (torch.Tensor, torch.nn.Parameter)
        and thing.shape in shapes
        and thing.is_floating_point()
        and not thing.requires_grad  # as hidden states do
        and thing.untyped_storage().nbytes() > 4  # a stand-in's one number
        and thing.untyped_storage().data_ptr() not in memory
    )


def _plain_loss(
    model: Any, source: Any, denoiser: Any, network: Any, pairs: dict[str, Any], given: tuple[Any, ...]
) -> float:
    """The same loss and its gradients by a copy in fp32, with the LoRA added in hooks."""
    noisy, times, text, target = given
    wired = model.model
    plain = copy.deepcopy(source.model.diffusion_model)
    for module in plain.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    kept = tensor.detach().float().clone() if tensor.is_floating_point() else tensor.clone()
                    tensors[name] = torch.nn.Parameter(kept, False) if tensors is module._parameters else kept
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = False
    plain.dtype = torch.float32
    handles = [
        plain.get_submodule(name).register_forward_hook(
            lambda _m, given, output, pair=pair: output + (given[0] @ pair[0].flatten(1).T) @ pair[1].flatten(1).T
        )
        for name, pair in pairs.items()
    ]
    own = wired.diffusion_model
    wired.diffusion_model = plain
    together = pack_module("nodes.wired.conditioning").together
    options = pack_module("nodes.wired.families").family_of(model).training_options
    sampling = wired.model_sampling
    comfy.model_management.in_training = True
    try:
        wired.model_sampling = network.giving_output()
        x = noisy.unsqueeze(2) if denoiser._frames else noisy
        parts, first = [], 0
        with _kept_as_copies(), _plain_kernels():
            for count, conds in together([prompt.conds(wired, x[:1], **options) for prompt in text.prompts]):
                parts.append(wired._apply_model(x[first : first + count], times[first : first + count], **conds))
                first += count
            found = torch.cat(parts)
            loss = ((found.squeeze(2) if denoiser._frames else found) - target).square().mean()
            loss.backward()
        return loss.item()
    finally:
        comfy.model_management.in_training = False
        wired.diffusion_model, wired.model_sampling = own, sampling
        for handle in handles:
            handle.remove()


def _kept_as_copies() -> contextlib.AbstractContextManager[None]:
    """Inside, autograd keeps copies, which later in-place operations do not change.

    PyTorch's own ``allow_mutation_on_saved_tensors`` takes a new tensor for an old one that had the same address.
    """
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda kept: kept)
    return hooks  # type: ignore[no-any-return]


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Inside, ComfyUI's fused operations are those that are written in PyTorch."""
    fused = getattr(comfy.quant_ops, "ck", None)
    if not hasattr(fused, "rms_rope_split_half"):  # 0.3.75
        yield
        return
    plain = importlib.import_module(f"{fused.__name__}.backends.eager")
    own = {name: getattr(fused, name) for name in fused.__all__ if "rope" in name and hasattr(plain, name)}
    for name in own:
        setattr(fused, name, getattr(plain, name))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(fused, name, function)


class ProbeBothPaths:
    """One step's loss and gradients on the connected model, beside those through diffusers, for Stable Diffusion."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",), "nonce": ("INT",)},
        }

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, model: Any, clip: Any, vae: Any, nonce: int) -> dict[str, Any]:
        wired = pack_module("nodes.wired.base")
        with torch.inference_mode(False), torch.enable_grad():
            bases = [pack_module("nodes.bridge").base_from_graph(model, clip, vae), wired.wired_base(model, clip, vae)]
            found = [self._step(base) for base in bases]
        (loss, theirs, target), (wired_loss, ours, wired_target) = found
        assert theirs.keys() == ours.keys(), set(theirs) ^ set(ours)
        differences = [float((ours[name] - one).abs().max() / (one.abs().max() + 1e-9)) for name, one in theirs.items()]
        report = {
            "loss": loss,
            "wired_loss": wired_loss,
            "difference": max(differences),
            "target": float((target - wired_target).abs().max()),
            "layers": len(theirs),
        }
        return {"ui": {"report": [report]}}

    @staticmethod
    def _step(base: Any) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
        """Loss, the gradients by the file's keys, and the target."""
        adapter, config = pack_module("trainer.learn.adapter"), pack_module("trainer.config")
        denoiser = base.denoiser
        network = denoiser.build(torch.float32)
        adapter.inject(
            network, config.TrainConfig(rank=4, network_alpha=4.0), denoiser.adapter_layers(network, "attention+mlp")
        )
        parameters = adapter.adapter_parameters(network)
        keys = {name: (denoiser.file_key(name.rsplit(".", 2)[0]), name.rsplit(".", 2)[1]) for name in parameters}
        for name, parameter in parameters.items():
            random = torch.Generator().manual_seed(int.from_bytes("".join(keys[name]).encode()[-6:], "big") % 2**31)
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.05)
        random = torch.Generator().manual_seed(2)
        texts = base.prompts.encode(["a photo of ohwx cat", "a cat"])
        latents, noise = (torch.randn(2, *denoiser.latent_size(64, 64), generator=random) for _ in "xn")
        times = denoiser.times(torch.tensor([0.3, 0.7], dtype=torch.float64))
        noisy, target = (f(latents, noise, times) for f in (denoiser.noisy_latents, denoiser.target))
        try:
            prediction = denoiser.predict(network, noisy, times, texts[0].joined(texts[1:]))
            loss = (prediction - target).square().mean()
            loss.backward()
        finally:
            denoiser.release(network)
        return loss.item(), {".".join(keys[name]): value.grad.flatten(1) for name, value in parameters.items()}, target


NODES = {"ProbeWiredGradients": ProbeWiredGradients, "ProbeBothPaths": ProbeBothPaths}
