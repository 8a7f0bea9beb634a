"""Run by a test in a process of its own: what the pack reads out of a wired base, with dynamic VRAM or without.

Dynamic VRAM needs an NVIDIA card. Its bookkeeping does not: the patcher that ComfyUI uses there runs on a CPU when its
own rerouting of CPUs is taken away and weights are read by safetensors in place of the memory map. Weights then stay
in the file's dtype, with the dtype in use next to them, as on a card.

Arguments: ComfyUI's tree, "plain" or "dynamic", a checkpoint, a LoRA. Prints one JSON object.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMFYUI, MODE, CHECKPOINT, LORA = sys.argv[1:]
sys.argv = ["main.py", "--cpu", "--fp16-unet", "--fp32-text-enc", "--bf16-vae"]
sys.path.insert(0, COMFYUI)
package = types.ModuleType("subjectbooth")
package.__path__ = [str(Path(__file__).resolve().parents[2])]
sys.modules["subjectbooth"] = package
sys.modules["server"] = types.ModuleType("server")  # the bridge imports it; nothing here needs a running one
sys.modules["server"].PromptServer = None  # type: ignore[attr-defined]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.utils  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

if MODE == "dynamic":
    import comfy.memory_management
    import comfy_aimdo.host_buffer

    class NoBuffer:
        """In place of pinned memory."""

        size = 0

        def __init__(self, *_: Any) -> None:
            pass

        def truncate(self, *_: Any, **__: Any) -> None:
            pass

    comfy.memory_management.aimdo_enabled = True
    patcher_class = comfy.model_patcher.ModelPatcherDynamic
    patcher_class.__new__ = lambda cls, *_, **__: object.__new__(cls)
    comfy.model_patcher.CoreModelPatcher = patcher_class
    comfy_aimdo.host_buffer.HostBuffer = NoBuffer
    comfy.utils.load_safetensors = lambda path: (safetensors.torch.load_file(path), {})

import comfy.sd  # noqa: E402

from subjectbooth.nodes import bridge, graph_terms, lora_choice, lora_file, noise, sampling, weights, wired_checks  # noqa: E402
from subjectbooth.nodes.wired.network import WiredNetwork  # noqa: E402
from subjectbooth.nodes.wired.objective import Objective  # noqa: E402
from subjectbooth.trainer.errors import SubjectBoothError  # noqa: E402
from subjectbooth.trainer.files.storage import sha256_of  # noqa: E402
from subjectbooth.trainer.topics import Topic  # noqa: E402

UNET = bridge.UNET_PREFIX
logged: list[str] = []
# What a prompt says is no matter here, and the text encoder is slow.
sampling.encode = lambda clip, text: [[torch.ones(1, 77, 768), {}]]
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
logging.getLogger().addHandler(handler)


def said_by(call: Callable[[], Any]) -> str:
    """The message of what it raises; "" where it raises nothing."""
    try:
        call()
    except Exception as error:  # whatever it is, the test wants to see it
        return f"{type(error).__name__}: {error}"
    return ""


def hash_of(patcher: Any) -> str:
    """Over the weights that training takes, with their dtypes."""
    taken = weights.effective_weights(patcher, UNET)
    return sha256_of("\n".join(sorted(f"{name} {sha256_of(taken[name])}" for name in taken)))


def with_schedule(model: Any, zsnr: bool) -> Any:
    """The model behind ComfyUI's node ModelSamplingDiscrete."""
    sys.modules["nodes"] = types.ModuleType("nodes")  # it imports ComfyUI's own, and needs nothing of it here
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(model, "v_prediction", zsnr)[0]


def schedule_of(model: Any) -> tuple[float, str]:
    """The last of alphas_cumprod, which tells a zero terminal SNR, and the kind of prediction."""
    alphas_cumprod, prediction = noise.noise_schedule(model)
    return float(alphas_cumprod[-1]), prediction


def latents_of(model: Any) -> torch.Tensor:
    pictures = sampling.PictureSampler(
        model,
        None,
        prompt="a cat",
        negative="",
        size=(64, 64),
        sampler_name="euler",
        scheduler="normal",
        steps=2,
        cfg=1.0,
    )
    return pictures.sample([5], lambda *_: None)


def _unet() -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in safetensors.torch.load_file(CHECKPOINT).items()
        if name.startswith("model.diffusion_model.")
    }


def loaded_and_read() -> dict[str, Any]:
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(CHECKPOINT)[:3]
    other = comfy.sd.load_diffusion_model_state_dict({name: tensor * 1.1 for name, tensor in _unet().items()})
    lora = comfy.utils.load_torch_file(LORA)
    styled, styled_clip = comfy.sd.load_lora_for_models(model, clip, lora, 0.7, 0.7)
    merged = model.clone()
    for key, entries in other.get_key_patches(UNET).items():
        merged.add_patches({key: entries}, 0.5, 0.5)
    found: dict[str, Any] = {
        "patcher": type(model).__name__,
        "kinds": [
            dict(Counter(weights.stored_as(patcher, prefix).values()))
            for patcher, prefix in ((model, UNET), (clip.patcher, "clip_l.transformer.text_model."), (vae.patcher, ""))
        ],
        "unet": weights.digest_of(model, UNET),
        "clip": weights.digest_of(clip.patcher),
        "vae": weights.digest_of(vae.patcher),
        "base": bridge.base_digest(model, clip, vae),
        "styled": bridge.base_digest(styled, styled_clip, vae),
        "merged": weights.digest_of(merged, UNET),
        "taken": [hash_of(patcher) for patcher in (model, styled, merged)],
        "family": bridge.check_wired(styled, styled_clip, vae).family.name,
    }
    comfy.model_management.load_models_gpu([styled, styled_clip.patcher])
    weights._patched_digests.clear()
    weights._original_digests.clear()
    found["after loading"] = [
        bridge.base_digest(model, clip, vae),
        bridge.base_digest(styled, styled_clip, vae),
        *(hash_of(patcher) for patcher in (model, styled)),
    ]
    found["refused"] = refusals(model, clip, vae, lora)
    found["schedules"] = schedules(model)
    found["ignored"] = ignored(model)
    found["out of memory"] = out_of_memory(model)
    found["applied again"] = applied_again(model, clip)
    found["side by side"] = put_on_side_by_side(model)
    return found


def refusals(model: Any, clip: Any, vae: Any, lora: Any) -> dict[str, str]:
    unet = _unet()
    fp8 = comfy.sd.load_diffusion_model_state_dict(dict(unet), model_options={"dtype": torch.float8_e4m3fn})
    widened = comfy.sd.load_diffusion_model_state_dict(
        {name: tensor.to(torch.float8_e4m3fn) for name, tensor in unet.items()}, model_options={"dtype": torch.float16}
    )
    wrapped = model.clone()
    wrapped.add_weight_wrapper(f"{UNET}out.2.weight", lambda weight: weight)
    found = {
        "used in fp8": said_by(lambda: bridge.check_wired(fp8, clip, vae)),
        "taken in fp8": said_by(lambda: weights.effective_weights(fp8, UNET)),
        "stored in fp8, used in fp16": said_by(lambda: bridge.check_wired(widened, clip, vae)),
        "weight wrapper": said_by(lambda: bridge.check_wired(wrapped, clip, vae)),
    }
    if hasattr(comfy.sd, "load_bypass_lora_for_models"):
        bypassed, bypassed_clip = comfy.sd.load_bypass_lora_for_models(model, clip, lora, 1.0, 1.0)
        found["bypass on MODEL"] = said_by(lambda: bridge.check_wired(bypassed, clip, vae))
        found["bypass on CLIP"] = said_by(lambda: bridge.check_wired(model, bypassed_clip, vae))
    if hasattr(comfy.utils, "string_to_seed"):  # no older version reads comfy_quant
        text = quantised(
            {
                name.removeprefix("cond_stage_model.transformer."): tensor
                for name, tensor in safetensors.torch.load_file(CHECKPOINT).items()
                if name.startswith("cond_stage_model.")
            },
            "text_model.encoder.layers.0.mlp.fc1",
        )
        quantised_clip = comfy.sd.load_text_encoder_state_dicts(
            [text], model_options={"quantization_metadata": {"mixed_ops": True}}
        )
        found["quantised CLIP"] = said_by(lambda: bridge.check_wired(model, quantised_clip, vae))
        quantised_unet = comfy.sd.load_diffusion_model_state_dict(
            quantised(dict(unet), "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q")
        )
        found["quantised MODEL"] = said_by(lambda: bridge.check_wired(quantised_unet, clip, vae))
    return found


def quantised(tensors: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    """The same with one layer in ComfyUI's own fp8 format."""
    weight = tensors[f"{layer}.weight"].float()
    scale = weight.abs().max() / 448
    return {
        **tensors,
        f"{layer}.weight": (weight / scale).to(torch.float8_e4m3fn),
        f"{layer}.weight_scale": scale,
        f"{layer}.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8),
    }


def schedules(model: Any) -> dict[str, Any]:
    """Of the plain model and of one behind ModelSamplingDiscrete: as they are made, and after both were sampled with in
    turn. On a second copy of the model they are sampled with in the other order."""
    twin = comfy.sd.load_diffusion_model_state_dict(_unet())
    rescaled, twin_rescaled = with_schedule(model, True), with_schedule(twin, True)
    before = [schedule_of(model), schedule_of(rescaled)]
    plain_first = [latents_of(model), latents_of(rescaled)]
    rescaled_first = [latents_of(twin_rescaled), latents_of(twin)]
    again = [[schedule_of(first), schedule_of(second)] for first, second in ((model, rescaled), (twin, twin_rescaled))]
    return {
        "before": before,
        "after": again,
        "mixed up": _mixed_up(model, rescaled),
        "class images": [
            float((one - other).abs().max()) for one, other in zip(plain_first, reversed(rescaled_first), strict=True)
        ],
        "effect": float((plain_first[0] - plain_first[1]).abs().max()),
    }


def _mixed_up(model: Any, rescaled: Any) -> list[tuple[float, str]]:
    """The two schedules when each object holds the other's tables, as dynamic VRAM can leave them."""
    objects = [patcher.get_model_object("model_sampling") for patcher in (model, rescaled)]
    tables = [thing.sigmas for thing in objects]
    kept, weights.memory_management = weights.memory_management, types.SimpleNamespace(aimdo_enabled=True)
    try:
        for thing, table in zip(objects, reversed(tables), strict=True):
            thing.set_sigmas(table)
        return [(round(last, 5), kind) for last, kind in (schedule_of(model), schedule_of(rescaled))]
    finally:
        weights.memory_management = kept
        for thing, table in zip(objects, tables, strict=True):
            thing.set_sigmas(table)


def ignored(model: Any) -> dict[str, Any]:
    overridden = model.clone()
    overridden.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda function, *arguments, **more: 0 * function(*arguments, **more)
    )
    plain, dropped = sampling.without_guidance_patches(overridden)
    overridden.additional_models["multigpu"] = [model.clone()]
    return {
        "none": wired_checks.ignored_patches(model),
        "both": wired_checks.ignored_patches(overridden),
        "dropped": dropped,
        "class image": float((latents_of(plain) - latents_of(model)).abs().max()),
        "effect": float((_sampled_as_is(overridden) - latents_of(model)).abs().max()),
    }


def _sampled_as_is(model: Any) -> torch.Tensor:
    kept, sampling.without_guidance_patches = sampling.without_guidance_patches, lambda given: (given, [])
    try:
        return latents_of(model)
    finally:
        sampling.without_guidance_patches = kept


def out_of_memory(model: Any) -> dict[str, str]:
    """What is said of errors that ComfyUI's sampler raises."""
    errors = {"torch": torch.OutOfMemoryError("x"), "another": RuntimeError("shapes differ")}
    if hasattr(torch, "AcceleratorError"):
        errors["accelerator"] = torch.AcceleratorError("CUDA error: out of memory")
        errors["another of it"] = torch.AcceleratorError("CUDA error: invalid argument")
    found = {}
    kept = comfy.sample.sample, comfy.model_management.unload_all_models
    comfy.model_management.unload_all_models = lambda: None
    for name, error in errors.items():

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        comfy.sample.sample = fail
        found[name] = said_by(lambda: latents_of(model))
    comfy.sample.sample, comfy.model_management.unload_all_models = kept
    return found


def put_on_side_by_side(model: Any) -> dict[str, Any]:
    """What is left of a network's changes to the model after two threads put it on at once."""
    layers = list(model.model.diffusion_model.modules())
    attention = comfy.ldm.modules.attention.optimized_attention
    network = WiredNetwork(model, Objective(model.get_model_object("model_sampling")))
    together, interval = threading.Barrier(2), sys.getswitchinterval()

    def put_on() -> None:
        together.wait()
        network.put_on()

    threads = [threading.Thread(target=put_on) for _ in range(2)]
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    while_on = sum("forward" in vars(layer) for layer in layers)
    network.take_off()
    return {
        "on": while_on,
        "left": sum("forward" in vars(layer) for layer in layers),
        "attention": comfy.ldm.modules.attention.optimized_attention is attention,
    }


def applied_again(model: Any, clip: Any) -> dict[str, Any]:
    """Weights that ComfyUI patches when a LoRA is applied and loaded; again the same; and at another strength."""
    lora = lora_file.load_lora_file(Path(LORA))
    kept, calls, found = comfy.lora.calculate_weight, [], {}

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return kept(*arguments, **keywords)

    comfy.lora.calculate_weight = counted
    outcomes = []
    for name, strength in {"first": 1.0, "again": 1.0, "stronger": 1.5}.items():
        outcomes.append(lora_choice.apply_lora(model, clip, lora_file.load_lora_file(Path(LORA)), strength, strength))
        calls.clear()
        comfy.model_management.load_models_gpu([outcomes[-1][0], outcomes[-1][1].patcher], force_patch_weights=False)
        found[f"latents {name}"] = float(latents_of(outcomes[-1][0]).double().sum())
        found[name] = len(calls)
    comfy.lora.calculate_weight = kept
    found["read once"] = lora_file.load_lora_file(Path(LORA)) is lora
    return found


def without_dynamic_vram() -> dict[str, Any]:
    """The rule of dynamic VRAM on a small module, which any ComfyUI can be asked about."""

    def patcher_of(*kinds: torch.dtype | None) -> Any:
        torch.manual_seed(0)
        module = torch.nn.Module()
        module.diffusion_model = torch.nn.Linear(8, 8)
        for name, kind in zip(("weight", "bias"), kinds, strict=True):
            if kind is not None:
                setattr(module.diffusion_model, f"{name}_comfy_model_dtype", kind)
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(module, load_device=cpu, offload_device=cpu)

    stored_half = patcher_of(None, None)
    stored_half.model.diffusion_model.weight.data = stored_half.model.diffusion_model.weight.data.half()
    digest = weights.digest_of(stored_half)
    kept, weights.memory_management = weights.memory_management, types.SimpleNamespace(aimdo_enabled=True)
    try:
        used_half = patcher_of(torch.float16, None)
        return {
            "stored": digest,
            "used": weights.digest_of(used_half),
            "kinds": weights.stored_as(used_half),
            "fp8": said_by(lambda: weights.effective_weights(patcher_of(torch.float8_e4m3fn, torch.float16))),
        }
    finally:
        weights.memory_management = kept


def batches() -> dict[str, Any]:
    """How many class images at once a pretended card allows. A picture takes 1 GB, by ComfyUI's own estimate."""
    management, card = comfy.model_management, torch.device("cuda", 0)
    gigabyte = 10**9

    def model(size: float, loaded: float, **more: Any) -> Any:
        estimate = types.SimpleNamespace(
            memory_required=lambda input_shape: input_shape[0] / 2 * gigabyte,
            latent_format=types.SimpleNamespace(latent_channels=4),
        )
        return types.SimpleNamespace(
            load_device=card,
            model=estimate,
            model_size=lambda: size * gigabyte,
            is_clone=lambda other: False,
            loaded_size=lambda: loaded * gigabyte,
            memory_required=lambda shape: 50 * gigabyte,
            **more,
        )

    clip = types.SimpleNamespace(device=card, model=model(5, 5))
    kept = management.get_free_memory, management.current_loaded_models
    management.get_free_memory = lambda device=None, torch_free_too=False: 2 * gigabyte
    management.current_loaded_models = [clip]
    streamed = model(40, 1, is_dynamic=lambda: True, get_free_memory=lambda device: 8 * gigabyte)
    try:
        return {
            "nothing loaded": sampling.automatic_batch_size(model(4, 0), 512, 8, "euler"),
            "loaded": sampling.automatic_batch_size(model(4, 4), 512, 8, "euler"),
            "streamed": sampling.automatic_batch_size(streamed, 512, 8, "euler"),
            "not independent": sampling.automatic_batch_size(model(4, 0), 512, 8, "euler_ancestral"),
        }
    finally:
        management.get_free_memory, management.current_loaded_models = kept


@graph_terms.graph_messages()
def fail(topic: Topic) -> None:
    """As a node's ``execute`` does."""
    raise SubjectBoothError("given", "needed", "do", about=topic)


def is_own_cause() -> bool:
    """Whether an error that needs no translation is chained to itself."""
    try:
        with graph_terms.graph_messages():
            raise SubjectBoothError("given", "needed", "do")
    except SubjectBoothError as error:
        return error.__cause__ is error


with torch.inference_mode():
    found = loaded_and_read()
    found["rule"] = without_dynamic_vram()
    found["batches"] = batches()
    found["own cause"] = is_own_cause()
    found["topics"] = {topic.name: said_by(lambda topic=topic: fail(topic)) for topic in Topic}
found["logged"] = [line for line in logged if "deprecated" in line or "has moved" in line]
print(json.dumps(found))
