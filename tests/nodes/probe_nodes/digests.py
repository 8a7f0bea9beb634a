"""What the pack takes a wired base to be, and the memory that its left-over weights came out of."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import torch

from .predictions import pack_module


class ProbeBaseDigest:
    """The base's digest as computed for a model that was just loaded, and how many weights were hashed for it. With
    `fill`, weights that no checkpoint holds are first set to that number, as if other things had been in memory before.
    With `edit`, the last number of CLIP's weight of that name is another one for the time of the probe."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        models = {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",)}
        fill, edit = ("FLOAT", {"default": 0.0, "min": -1e6, "max": 1e6}), ("STRING", {"default": ""})
        return {"required": {**models, "fill": fill}, "optional": {"edit": edit}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, model: Any, clip: Any, vae: Any, fill: float, edit: str = "") -> dict[str, Any]:
        state = clip.patcher.model.state_dict()
        with torch.inference_mode():
            for name in ("clip_l.transformer.text_projection.weight", "clip_l.logit_scale"):
                state[name].fill_(fill)
        weights, bridge = pack_module("nodes.weights"), pack_module("nodes.bridge")
        for patcher in (clip.patcher, model, vae.patcher):
            weights._original_digests.pop(patcher.model, None)
        edited = state[edit].flatten()[-1:] if edit else torch.zeros(1)
        with torch.inference_mode():
            edited += 1
        try:
            with mock.patch.object(weights, "_original", wraps=weights._original) as hashed:
                digest = bridge.base_digest(model, clip, vae)
        finally:
            with torch.inference_mode():
                edited -= 1
            weights._original_digests.pop(clip.patcher.model, None)
        return {"ui": {"report": [{"digest": digest, "hashed": hashed.call_count}]}}


class ProbeRunOnACopy:
    """Trains what the trainer's node with these inputs did while Stable Diffusion was copied for training; `steps`: so
    many of them, as if the run was cancelled then."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        wired = {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",), "subject": ("SUBJECT",)}
        return {"required": {**wired, "inputs": ("STRING",), "steps": ("INT",)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, model: Any, clip: Any, vae: Any, subject: Any, inputs: str, steps: int) -> dict[str, Any]:
        config = pack_module("nodes.settings").config_from(json.loads(inputs), subject.resolution)
        with torch.inference_mode(False), torch.enable_grad():
            base = pack_module("nodes.bridge").base_from_graph(model, clip, vae)
            recipe = pack_module("trainer.runs.recipe").Recipe(base, subject, config)
            run = recipe.run(pack_module("nodes.host").pack_output_dir(), torch.device("cpu"))
            events = run.events()
            for event in events:
                if getattr(event, "step", 0) == steps and type(event).__name__ == "StepDone":
                    events.close()
                    break
        return {"ui": {"report": [{"run": run.folder.path.name}]}}


class ProbeQuantised:
    """What is said of a model one of whose layers keeps its weight as ComfyUI-GGUF's do."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, model: Any, clip: Any, vae: Any) -> dict[str, Any]:
        check = pack_module("nodes.bridge").check_wired
        layer = model.model.diffusion_model.out[2]

        def save(destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            destination[f"{prefix}weight"] = torch.zeros(3, 5, dtype=torch.uint8, device="meta")
            destination[f"{prefix}bias"] = torch.zeros(3, device="meta")
            destination[f"{prefix}temp.weight"] = torch.zeros(4, 320, 3, 3, dtype=torch.float16, device="meta")

        family = check(model, clip, vae).family.name
        layer._save_to_state_dict = save
        try:
            check(model, clip, vae)
            said = ""
        except Exception as error:  # whatever it says is what the test wants to see
            said = str(error)
        finally:
            del layer._save_to_state_dict
        return {"ui": {"report": [{"family": family, "said": said}]}}


class ProbeAttention:
    """The model with an attention function of its own on it, as packs for SageAttention put one; it gives nothing but
    zeros, so that its use would show."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    RETURN_TYPES = ("MODEL",)
    CATEGORY = "probe"
    FUNCTION = "patch"

    def patch(self, model: Any) -> tuple[Any]:
        patched = model.clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = (
            lambda function, *arguments, **more: 0 * function(*arguments, **more)
        )
        return (patched,)


NODES = {
    "ProbeAttention": ProbeAttention,
    "ProbeBaseDigest": ProbeBaseDigest,
    "ProbeRunOnACopy": ProbeRunOnACopy,
    "ProbeQuantised": ProbeQuantised,
}
