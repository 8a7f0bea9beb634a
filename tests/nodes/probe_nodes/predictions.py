"""Probes that hold ComfyUI's own forward pass against the trainer's, inside the same process."""

from __future__ import annotations

import sys
from typing import Any

import comfy.model_management
import torch

TIMESTEPS = (50, 400, 900)


def pack_module(name: str) -> Any:
    """A module of the pack under whatever name ComfyUI has loaded it ("nodes.bridge", say)."""
    return next(module for key, module in sys.modules.items() if key.endswith(f"SubjectBooth.{name}"))


def encode(bridge: Any, clip: Any, model: Any, vae: Any, image: torch.Tensor, prompt: str) -> tuple[Any, torch.Tensor]:
    pooled = model.model.adm_channels > 0
    conditioning = bridge.ComfyPromptEncoder(clip, pooled=pooled).encode([prompt])[0]
    latents = bridge.ComfyLatentCodec(model, vae).encode(image[:1].movedim(-1, 1))
    return conditioning, latents


def comfy_outputs(model: Any, conditioning: Any, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What ComfyUI's UNet itself gives for the photo at several noise levels, through its own apply_model."""
    seen: list[torch.Tensor] = []
    more = {}
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        if conditioning.pooled is not None:  # SDXL: pooled prompt and size ids, as the sampler gives them
            height, width = (8 * side for side in latents.shape[2:])
            more["y"] = model.model.encode_adm(pooled_output=conditioning.pooled, width=width, height=height)
        sampling = model.get_model_object("model_sampling")
        unet = model.model.diffusion_model
        hook = unet.register_forward_hook(lambda _module, _inputs, output: seen.append(output.float().cpu()))
        try:
            for timestep in TIMESTEPS:
                sigma = sampling.sigmas[timestep].reshape(1)
                noisy = sampling.noise_scaling(sigma, noise.clone(), latents.clone())
                model.model.apply_model(
                    noisy,
                    sigma,
                    c_crossattn=conditioning.hidden_states,
                    transformer_options=model.model_options["transformer_options"],
                    **more,
                )
        finally:
            hook.remove()
    return torch.cat(seen)


def trainer_outputs(
    base: Any, conditioning: Any, latents: torch.Tensor, noise: torch.Tensor, lora: Any, strength: float
) -> torch.Tensor:
    """What the trainer's UNet gives for the same, with the adapter of `lora` at `strength` when there is one."""
    adapter, config = pack_module("trainer.learn.adapter"), pack_module("trainer.config")
    denoiser = base.denoiser
    unet = denoiser.build(torch.float32)
    if lora is not None:
        rank, alpha = int(lora.metadata["ss_network_dim"]), float(lora.metadata["ss_network_alpha"])
        targets = "attention+mlp" if any("_ff_net_" in key for key in lora.tensors) else "attention"
        settings = config.TrainConfig(rank=rank, network_alpha=abs(alpha * strength), lora_targets=targets)
        adapter.inject(unet, settings, denoiser.adapter_layers(unet, targets))
        state = {}
        for name in adapter.adapter_state(unet):
            layer, kind, _ = name.rsplit(".", 2)
            direction = "lora_down" if kind == "lora_A" else "lora_up"
            sign = -1.0 if strength < 0 and kind == "lora_B" else 1.0
            state[name] = sign * lora.tensors[f"{denoiser.file_key(layer)}.{direction}.weight"]
        adapter.load_adapter_state(unet, state)
    outputs = []
    with torch.no_grad():
        for timestep in TIMESTEPS:
            steps = torch.tensor([timestep])
            noisy = denoiser.noisy_latents(latents, noise, steps)
            outputs.append(denoiser.predict(unet, noisy, steps, conditioning))
    return torch.cat(outputs)


class ProbePredictions:
    """Largest difference between ComfyUI's and the trainer's prediction on a VAE-encoded photo.

    `model`, `clip` and `vae` are the trainer's base; `applied` is what ComfyUI is asked (the base when not wired).
    `subject_lora` and `strength` are what the trainer puts on the base to match it.
    """

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "vae": ("VAE",),
                "image": ("IMAGE",),
                "prompt": ("STRING", {"default": "a photo of ohwx cat"}),
                "nonce": ("INT", {"default": 0}),
            },
            "optional": {
                "applied": ("MODEL",),
                "subject_lora": ("SUBJECT_LORA",),
                "strength": ("FLOAT", {"default": 1.0, "min": -10.0}),
            },
        }

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        image: Any,
        prompt: str,
        nonce: int,
        applied: Any = None,
        subject_lora: Any = None,
        strength: float = 1.0,
    ) -> dict[str, Any]:
        bridge = pack_module("nodes.bridge")
        with torch.inference_mode(False):
            base = bridge.base_from_graph(model, clip, vae)
            conditioning, latents = encode(bridge, clip, model, vae, image, prompt)
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
            theirs = comfy_outputs(applied or model, conditioning, latents, noise)
            plain = comfy_outputs(model, conditioning, latents, noise)
            ours = trainer_outputs(base, conditioning, latents, noise, subject_lora, strength)
        report = {
            "difference": float((theirs - ours).abs().max()),
            "scale": float(theirs.abs().max()),
            "effect": float((theirs - plain).abs().max()),
            "digest": base.digest,
        }
        return {"ui": {"report": [report]}}


class ProbeText:
    """Largest difference between ComfyUI's encoded prompt and the trainer's, with a LoRA on it or without.

    `clip` is the trainer's base, `applied` what ComfyUI encodes with (the base when not wired).
    """

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "prompt": ("STRING", {"default": ""}),
                "nonce": ("INT", {"default": 0}),
            },
            "optional": {"applied": ("CLIP",), "subject_lora": ("SUBJECT_LORA",)},
        }

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(
        self, model: Any, clip: Any, prompt: str, nonce: int, applied: Any = None, subject_lora: Any = None
    ) -> dict[str, Any]:
        bridge = pack_module("nodes.bridge")
        text_encoder, layout, layers, adapter, config = (
            pack_module(f"trainer.{name}")
            for name in ("base.sd.text_encoder", "base.sd.layout", "base.sd.target_layers", "learn.adapter", "config")
        )
        with torch.inference_mode(False), torch.no_grad():
            family = layout.LdmLayout.of(bridge.shapes_of(model, bridge.UNET_PREFIX), "test").family
            theirs = bridge.ComfyPromptEncoder(applied or clip).encode([prompt])[0].hidden_states
            plain = bridge.ComfyPromptEncoder(clip).encode([prompt])[0].hidden_states
            models = bridge.text_encoders(clip, family, torch.float32)
            if subject_lora is not None:
                rank, alpha = (
                    int(subject_lora.metadata["ss_network_dim"]),
                    float(subject_lora.metadata["ss_network_alpha"]),
                )
                targets = "all" if any("fc1" in key for key in subject_lora.tensors) else "attention"
                settings = config.TrainConfig(rank=rank, network_alpha=alpha, lora_targets=targets)
                for shape, encoder in zip(family.text_encoders, models, strict=True):
                    used = text_encoder.used_layers(shape, clip.layer_idx)
                    adapter.inject(encoder, settings, layers.text_target_layers(encoder, targets, used))
                    state = {}
                    for name in adapter.adapter_state(encoder):
                        layer, kind, _ = name.rsplit(".", 2)
                        key = f"{shape.prefix}_{text_encoder.lora_layer_name(layer).replace('.', '_')}"
                        direction = "lora_down" if kind == "lora_A" else "lora_up"
                        state[name] = subject_lora.tensors[f"{key}.{direction}.weight"]
                    adapter.load_adapter_state(encoder, state)
            ours = text_encoder.encode(
                models, family.text_encoders, [bridge.token_chunks(clip, prompt, family)], clip.layer_idx
            )[0].hidden_states
        report = {
            "difference": float((theirs - ours).abs().max()),
            "scale": float(theirs.abs().max()),
            "effect": float((theirs - plain).abs().max()),
            "tokens": theirs.shape[1],
        }
        return {"ui": {"report": [report]}}


class ProbeKeys:
    """What the trainer's last check says of an adapter with one layer that ComfyUI does not know."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "subject_lora": ("SUBJECT_LORA",)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, model: Any, clip: Any, subject_lora: Any) -> dict[str, Any]:
        check = pack_module("nodes.lora_file").require_all_keys
        layers = {key.split(".")[0] for key in subject_lora.tensors}
        broken = dict(subject_lora.tensors)
        for part in ("lora_up.weight", "lora_down.weight", "alpha"):
            broken[f"lora_unet_no_such_layer.{part}"] = subject_lora.tensors[f"{min(layers)}.{part}"]
        try:
            check(broken, model, clip)
            said = ""
        except Exception as error:  # whatever it says is what the test wants to see
            said = str(error)
        whole = check(subject_lora.tensors, model, clip)
        return {"ui": {"report": [{"said": said, "whole": whole, "layers": len(layers)}]}}


class ProbeFixedLoss:
    """The DreamBooth loss on the photos for 16 fixed (noise, timestep) pairs, asked of ComfyUI's own forward pass."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "vae": ("VAE",),
                "image": ("IMAGE",),
                "prompt": ("STRING", {"default": "a photo of ohwx cat"}),
            }
        }

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, model: Any, clip: Any, vae: Any, image: Any, prompt: str) -> dict[str, Any]:
        bridge = pack_module("nodes.bridge")
        losses = []
        with torch.inference_mode():
            conditioning = bridge.ComfyPromptEncoder(clip).encode([prompt])[0]
            latents = bridge.ComfyLatentCodec(model, vae).encode(image.movedim(-1, 1))
            comfy.model_management.load_models_gpu([model])
            sampling = model.get_model_object("model_sampling")
            for pair in range(16):
                random = torch.Generator().manual_seed(1000 + pair)
                timestep = int(torch.randint(0, 1000, (1,), generator=random))
                photo = latents[pair % len(latents)][None]
                noise = torch.randn(photo.shape, generator=random)
                sigma = sampling.sigmas[timestep].reshape(1)
                noisy = sampling.noise_scaling(sigma, noise.clone(), photo.clone())
                denoised = model.model.apply_model(
                    noisy,
                    sigma,
                    c_crossattn=conditioning.hidden_states,
                    transformer_options=model.model_options["transformer_options"],
                )
                epsilon = (noisy - denoised) / sigma
                losses.append(float(((epsilon - noise) ** 2).mean()))
        return {"ui": {"report": [{"loss": sum(losses) / len(losses), "losses": losses}]}}


class ProbeTraining:
    """From now on, notes what ComfyUI holds at the first optimizer step of each training; ProbeState-like report.

    It watches torch's own AdamW (a step hook), so nothing of the pack or of ComfyUI is replaced.
    """

    watched: list[int] = []
    fail_at_step: list[int] = []
    handle: Any = None

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"nonce": ("INT", {"default": 0}), "fail_at_step": ("INT", {"default": 0})}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, nonce: int, fail_at_step: int) -> dict[str, Any]:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        cls = type(self)
        seen = list(cls.watched)
        cls.watched.clear()
        cls.fail_at_step[:] = [fail_at_step] if fail_at_step else []
        if cls.handle is None:

            def watch(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
                cls.watched.append(len(comfy.model_management.current_loaded_models))
                if cls.fail_at_step and len(cls.watched) == cls.fail_at_step[0]:
                    cls.fail_at_step.clear()
                    raise RuntimeError("made to fail by the test")

            cls.handle = register_optimizer_step_pre_hook(watch)
        return {"ui": {"report": [{"loaded_at_each_step": seen}]}}


NODES = {
    "ProbePredictions": ProbePredictions,
    "ProbeText": ProbeText,
    "ProbeKeys": ProbeKeys,
    "ProbeFixedLoss": ProbeFixedLoss,
    "ProbeTraining": ProbeTraining,
}
