"""Small models of today's families with random weights, and a CLIP and VAE of a few layers that stand in for theirs.

The models are ComfyUI's own classes, built small, as their files have fixed sizes; so have the text encoders, which is
why prompts are random numbers here, made from the words.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch

from .predictions import pack_module
from .wired_kinds import KINDS, Kind

CPU = torch.device("cpu")


def build(kind: Kind, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """The model as a MODEL, with random weights that keep activations near 1."""
    settings = kind.settings()
    family = getattr(comfy.supported_models, kind.config)
    config = (type(kind.named, (family,), {}) if kind.named else family)(dict(settings))
    config.unet_config = dict(settings)
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    model = getattr(comfy.model_base, kind.model)(config, device=CPU)
    kind.shrink(model)
    random = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.diffusion_model.named_parameters(), *model.diffusion_model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        drawn = torch.randn(tensor.shape, generator=random) * 0.05
        plain = tensor.ndim > 1 or name.endswith("bias") or "pad" in name or name.endswith(kind.near_zero)
        tensor.copy_((drawn if plain else 1 + drawn).to(tensor.dtype))
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), CPU)


class PackedLinear(torch.nn.Linear):
    """A layer as ComfyUI-GGUF has them (commit 03842fa): bytes in place of a weight, which only its own operation can
    read, and stand-ins in the state dict."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = layer.weight.abs().max() / 127
        packed = (layer.weight / self.scale).round().to(torch.int8).flatten()
        self.weight, self.bias = torch.nn.Parameter(packed, requires_grad=False), layer.bias
        layer.weight.copy_(self.read())

    def read(self) -> torch.Tensor:
        return self.weight.float().view(self.out_features, self.in_features) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.read().to(x.dtype), self.bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = torch.zeros_like(self.weight, device="meta")
        destination[f"{prefix}temp.weight"] = torch.zeros(4, 4, device="meta")
        if self.bias is not None:
            destination[f"{prefix}bias"] = torch.zeros_like(self.bias, device="meta")


def packed(kind: Kind, seed: int, *, as_plain: bool) -> Any:
    """The MODEL with :class:`PackedLinear` for all linear layers, or the same numbers in plain ones."""
    model = build(kind, seed)
    for parent in list(model.model.diffusion_model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear) and not isinstance(layer, PackedLinear):
                small = PackedLinear(layer)
                if not as_plain:
                    setattr(parent, name, small)
    return model


def quantised(kind: Kind, seed: int, *, as_plain: bool) -> Any:
    """The MODEL with its linear layers in ComfyUI's own fp8 format, as quantised files have them; or the same numbers
    in a plain one."""
    plain = build(kind, seed)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in plain.model.diffusion_model.state_dict().items():
        layer, _, own = name.rpartition(".")
        if own == "weight" and isinstance(plain.model.diffusion_model.get_submodule(layer), torch.nn.Linear):
            scale = tensor.abs().max() / 448
            small = (tensor / scale).to(torch.float8_e4m3fn)
            tensor.copy_(small.float() * scale)
            weights[f"{layer}.weight_scale"], tensor = scale, small
            weights[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        weights[name] = tensor
    if as_plain:
        return plain
    config = plain.model.model_config
    config.quant_config = {"mixed_ops": True}
    model = getattr(comfy.model_base, kind.model)(config, device=CPU)
    missing, unexpected = model.diffusion_model.load_state_dict(weights, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    model.diffusion_model.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), CPU)


class FewLayers(torch.nn.Module):
    """Weights for a digest."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(4, 4, generator=random), requires_grad=False)


class ProbeClip(comfy.sd.CLIP):  # type: ignore[misc]
    """Encodes a prompt as random numbers from its words, in what form the family's own CLIP does."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(no_init=True)
        self.kind = kind
        self.cond_stage_model = FewLayers(1)
        self.patcher = comfy.model_patcher.ModelPatcher(self.cond_stage_model, CPU, CPU)
        self.layer_idx, self.tokenizer_options, self.use_clip_schedule = None, {}, False

    def clone(self, *_: Any, **__: Any) -> ProbeClip:
        other = copy.copy(self)
        other.patcher = self.patcher.clone()
        return other

    def tokenize(self, text: str, **_: Any) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str, *_: Any, **__: Any) -> list[Any]:
        states, options = self.kind.prompt(text)
        return [[states, options]]


class ProbeVae:
    """Averages the pixels of each latent pixel; channels beyond red, green and blue are differences of these."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.latent_channels = kind, kind.channels
        self.patcher = comfy.model_patcher.ModelPatcher(FewLayers(2), CPU, CPU)
        random = torch.Generator().manual_seed(5)
        self._mixed = torch.randn(kind.channels, 3, generator=random) / 3**0.5
        self._back = torch.linalg.pinv(self._mixed)

    def spacial_compression_encode(self) -> int:
        return self.kind.factor

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        if self.kind.frames:
            assert len(images) == 1, "a VAE for video takes a batch for the frames of one"
        small = torch.nn.functional.avg_pool2d(images.movedim(-1, 1) * 2 - 1, self.kind.factor)
        latents = torch.einsum("dc,nchw->ndhw", self._mixed, small)
        return latents.unsqueeze(2) if self.kind.frames else latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        small = latents.squeeze(2) if self.kind.frames else latents
        pixels = torch.einsum("cd,ndhw->nchw", self._back, small) / 2 + 0.5
        images = pixels.repeat_interleave(self.kind.factor, 2).repeat_interleave(self.kind.factor, 3).movedim(1, -1)
        return images.clamp(0, 1).unsqueeze(1) if self.kind.frames else images.clamp(0, 1)


STORED = ["float32", "float8_e4m3fn", "packed", "packed, plain"]
if hasattr(comfy.utils, "string_to_seed"):  # no older version reads comfy_quant
    STORED += ["comfy_quant", "rounded"]


class ProbeWiredBase:
    """A small MODEL of a family, with a CLIP and VAE."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "kind": (list(KINDS),),
                "seed": ("INT", {"default": 0}),
                "stored": (STORED,),
            },
            "optional": {"file": ("STRING", {"default": ""})},
        }

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    CATEGORY = "probe"
    FUNCTION = "make"

    def make(self, kind: str, seed: int, stored: str = "float32", file: str = "") -> tuple[Any, Any, Any]:
        """`file` is what a loader would have read it from."""
        found = KINDS[kind]
        if stored in ("comfy_quant", "rounded"):
            model = quantised(found, seed, as_plain=stored == "rounded")
        elif stored.startswith("packed"):
            model = packed(found, seed, as_plain=stored != "packed")
        else:
            model = build(found, seed, getattr(torch, stored))
        return model, ProbeClip(found), ProbeVae(found)


class ProbeWired:
    """What the trainer predicts with a LoRA beside what ComfyUI predicts with the same file applied.

    `model`, `clip` and `vae` are the trainer's base; `applied` is what ComfyUI is asked, and `model` with the file
    loaded as ComfyUI's own LoRA loaders do it.
    """

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "vae": ("VAE",),
                "applied": ("MODEL",),
                "subject_lora": ("SUBJECT_LORA",),
                "kind": (list(KINDS),),
                "seed": ("INT", {"default": 0}),
            },
        }

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(
        self, model: Any, clip: Any, vae: Any, applied: Any, subject_lora: Any, kind: str, seed: int
    ) -> dict[str, Any]:
        modules = {name: pack_module(f"nodes.wired.{name}") for name in ("base", "conditioning", "families")}
        with torch.inference_mode(False):
            base = modules["base"].wired_base(model, clip, vae)
            text = base.prompts.encode(["a photo of ohwx cat"])[0]
            random = torch.Generator().manual_seed(4)
            size = base.denoiser.latent_size(128, 128)
            latents, noise = (torch.randn(1, *size, generator=random) for _ in "xn")
            options = modules["families"].family_of(model).training_options
            file = comfy.utils.load_torch_file(str(subject_lora.path), safe_load=True)
            by_comfy, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)  # as its LoRA loaders do
            report: dict[str, float] = {"effect": 0.0, "difference": 0.0, "scale": 0.0}
            for time in (0.2, 0.5, 0.9):
                sigma = base.denoiser.times(torch.tensor([time], dtype=torch.float64))
                noisy = base.denoiser.noisy_latents(latents, noise, sigma)
                ours = self._trained(base, subject_lora, noisy, sigma, text)
                theirs, loaded, plain = (
                    self._sampled(one, noisy, sigma, text.prompts[0], options) for one in (applied, by_comfy, model)
                )
                report = {
                    "difference": max(
                        report["difference"], *(float((ours - one).abs().max()) for one in (theirs, loaded))
                    ),
                    "effect": max(report["effect"], float((theirs - plain).abs().max())),
                    "scale": max(report["scale"], float(theirs.abs().max())),
                }
        fresh = build(KINDS[kind], seed).model.diffusion_model.state_dict()
        now = model.model.diffusion_model.state_dict()
        same = fresh.keys() == now.keys() and all(torch.equal(now[name], fresh[name]) for name in fresh)
        return {"ui": {"report": [{**report, "untouched": same}]}}

    @staticmethod
    def _trained(base: Any, lora: Any, noisy: torch.Tensor, sigma: torch.Tensor, text: Any) -> torch.Tensor:
        """The trainer's network with the LoRA of the file."""
        adapter, config = pack_module("trainer.learn.adapter"), pack_module("trainer.config")
        denoiser = base.denoiser
        network = denoiser.build(torch.float32)
        rank, alpha = int(lora.metadata["ss_network_dim"]), float(lora.metadata["ss_network_alpha"])
        settings = config.TrainConfig(rank=rank, network_alpha=alpha)
        adapter.inject(network, settings, denoiser.adapter_layers(network, "attention"))
        state = {}
        for name in adapter.adapter_state(network):
            layer, kind, _ = name.rsplit(".", 2)
            state[name] = lora.tensors[f"{denoiser.file_key(layer)}.{kind}.weight"]
        adapter.load_adapter_state(network, state)
        try:
            with torch.no_grad():
                return denoiser.predict(network, noisy, sigma, text)  # type: ignore[no-any-return]
        finally:
            denoiser.release(network)

    @staticmethod
    def _sampled(model: Any, noisy: torch.Tensor, sigma: torch.Tensor, prompt: Any, options: Any) -> torch.Tensor:
        """ComfyUI's model, as its sampler calls it, with its own output seen by a hook."""
        frames = model.model.latent_format.latent_dimensions == 3
        x = noisy.unsqueeze(2) if frames else noisy
        seen: list[torch.Tensor] = []
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([model])
            conds = {name: value.cond for name, value in prompt.conds(model.model, x, **options).items()}
            hook = model.model.diffusion_model.register_forward_hook(lambda _m, _i, output: seen.append(output.float()))
            try:
                model.model.apply_model(x, sigma, transformer_options={}, **conds)
            finally:
                hook.remove()
        return seen[0].squeeze(2).clone() if frames else seen[0].clone()


class ProbeTimes:
    """Where the trainer's times lie for a tenth, half and 0.8413 of them, with these settings: ComfyUI's sigmas, and
    timesteps of the other path for Stable Diffusion."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        wired = {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",)}
        return {"required": {**wired, "sampling": ("STRING",), "shift": ("FLOAT",)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, model: Any, clip: Any, vae: Any, sampling: str, shift: float) -> dict[str, Any]:
        config = pack_module("trainer.config").TrainConfig(timestep_sampling=sampling, timestep_shift=shift)
        wired, own = pack_module("nodes.wired.base"), model.get_model_object("model_sampling")
        uniform = torch.tensor([0.1, 0.5, 0.8413447461], dtype=torch.float64)
        with torch.inference_mode(False):
            sigmas = wired.wired_base(model, clip, vae).with_times_of(config).denoiser.times(uniform)
            report = {"sigmas": sigmas.tolist(), "timesteps": own.timestep(sigmas).tolist(), "copied": []}
            if wired.is_stable_diffusion(model):
                copied = pack_module("nodes.bridge").base_from_graph(model, clip, vae)
                report["copied"] = copied.with_times_of(config).denoiser.times(uniform).tolist()
        return {"ui": {"report": [report]}}


NODES = {"ProbeWiredBase": ProbeWiredBase, "ProbeWired": ProbeWired, "ProbeTimes": ProbeTimes}
