"""Run by a test in a process of its own, with ComfyUI's tree as the first argument: true layouts on the meta device.

Prints one JSON object: for each family what was compared with ComfyUI's own model of it, without any weights.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, sys.argv.pop(1))
ROOT = Path(__file__).resolve().parents[2]
package = types.ModuleType("subjectbooth")
package.__path__ = [str(ROOT)]
sys.modules["subjectbooth"] = package

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

# The bridge imports it, and what is asked of the bridge here has no use for a running server.
sys.modules["server"] = types.ModuleType("server")
sys.modules["server"].PromptServer = None  # type: ignore[attr-defined]

import comfy.lora  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402

from subjectbooth.nodes.noise import noise_schedule  # noqa: E402
from subjectbooth.nodes.wired.denoiser import WiredDenoiser  # noqa: E402
from subjectbooth.nodes.wired.families import family_of  # noqa: E402
from subjectbooth.trainer.base.sd.denoiser import DiffusersUNet  # noqa: E402
from subjectbooth.trainer.base.sd.layout import LdmLayout  # noqa: E402
from subjectbooth.trainer.base.sd.ldm_unet import ldm_names  # noqa: E402
from subjectbooth.trainer.base.sd.schedule import make_noise_scheduler  # noqa: E402
from subjectbooth.trainer.base.stored.parts import stable_diffusion_schedule  # noqa: E402
from subjectbooth.trainer.config import TrainConfig  # noqa: E402
from subjectbooth.trainer.learn import adapter  # noqa: E402
from subjectbooth.trainer.runs.diffusers_names import with_kohya_names  # noqa: E402

COMMON: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "dtype": torch.float32,
}
FOUR_LEVELS: dict[str, Any] = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "adm_in_channels": None,
}
# As published in the original releases' configurations.
LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SD 1.x": (
        comfy.supported_models.SD15,
        {**COMMON, **FOUR_LEVELS, "context_dim": 768, "use_linear_in_transformer": False},
    ),
    "SD 2.x": (
        comfy.supported_models.SD20,
        {**COMMON, **FOUR_LEVELS, "context_dim": 1024, "use_linear_in_transformer": True},
    ),
    "SDXL": (
        comfy.supported_models.SDXL,
        {
            **COMMON,
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4],
            "context_dim": 2048,
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "transformer_depth_middle": 10,
            "use_linear_in_transformer": True,
            "adm_in_channels": 2816,
            "num_classes": "sequential",
        },
    ),
}


def compare(kind: Any, config: dict[str, Any]) -> dict[str, Any]:
    model_config = kind(dict(config))
    model = model_config.get_model({}, "", device=torch.device("meta"))
    shapes = {
        key.removeprefix("diffusion_model."): tensor.shape
        for key, tensor in model.state_dict().items()
        if key.startswith("diffusion_model.")
    }
    layout = LdmLayout.of(shapes, "test")
    denoiser = DiffusersUNet(layout, make_noise_scheduler(stable_diffusion_schedule(), "epsilon"), dict)
    with torch.device("meta"):
        unet = denoiser.outline()
        unet.requires_grad_(False)
        expected = {name: tensor.shape for name, tensor in unet.state_dict().items()}
        wired = _same_layers(model, layout, denoiser, unet)
        config = TrainConfig(rank=8)
        adapter.inject(unet, config, denoiser.adapter_layers(unet, config.lora_targets))
    found = {ours: shapes[ldm] for ldm, ours in layout.names.items()}
    state = {
        name.replace(f".{adapter.ADAPTER_NAME}.", "."): parameter
        for name, parameter in unet.named_parameters()
        if parameter.requires_grad
    }
    lora = adapter.to_file(state, denoiser.file_key, 8.0)
    key_map = comfy.lora.model_lora_keys_unet(model, {})
    of_diffusers = with_kohya_names({f"unet.{name}": tensor for name, tensor in state.items()}, {})
    same = {key_map.get(key.split(".")[0]) for key in of_diffusers} == {key_map.get(key.split(".")[0]) for key in lora}
    layers = {key.split(".")[0] for key in lora}
    fitting = [
        layer
        for layer in layers
        if layer in key_map
        and model.state_dict()[key_map[layer]].shape[:2]
        == (lora[f"{layer}.lora_up.weight"].shape[0], lora[f"{layer}.lora_down.weight"].shape[1])
    ]
    return {
        "family": layout.family.name,
        "parameters": sum(shape.numel() for shape in expected.values()),
        "same_names": set(found) == set(expected),
        "same_shapes": all(found.get(name) == shape for name, shape in expected.items()),
        "names_backwards": ldm_names(expected) == {ours: ldm for ldm, ours in layout.names.items()},
        "diffusers_names_taken": same,
        "layers": len(layers),
        "taken": len(fitting),
        "example": sorted(layers)[0],
        "wired_layers": wired,
    }


def _same_layers(model: Any, layout: LdmLayout, denoiser: DiffusersUNet, unet: Any) -> bool:
    """Whether the connected model gets a LoRA on the layers of the diffusers UNet, under the same keys and in the same
    order."""
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    wired = WiredDenoiser(patcher, family_of(patcher), 8, {}, layout)
    network = wired.outline()
    return all(
        [wired.file_key(layer) for layer in wired.adapter_layers(network, targets)]
        == [denoiser.file_key(layer) for layer in denoiser.adapter_layers(unet, targets)]
        for targets in ("attention", "attention+mlp", "all")
    )


def sampling(kind: Any, config: dict[str, Any], marks: tuple[str, ...]) -> dict[str, Any]:
    """How ComfyUI's own model of a checkpoint with these marks predicts, read through the bridge and as from a file."""
    model = kind(dict(config)).get_model({mark: torch.zeros(0) for mark in marks}, "", device=torch.device("meta"))
    patcher = types.SimpleNamespace(get_model_object=lambda name: getattr(model, name))
    alphas_cumprod, prediction_type = noise_schedule(patcher)
    from_file = stable_diffusion_schedule("ztsnr" in marks)
    return {
        "prediction_type": prediction_type,
        "last": float(alphas_cumprod[-1]),
        "difference": float((alphas_cumprod - from_file).abs().max()),
    }


MARKS: tuple[tuple[str, ...], ...] = ((), ("v_pred",), ("v_pred", "ztsnr"))
found = {name: compare(kind, config) for name, (kind, config) in LAYOUTS.items()}
found["sampling"] = {" ".join(marks): sampling(*LAYOUTS["SDXL"], marks) for marks in MARKS}
print(json.dumps(found))
