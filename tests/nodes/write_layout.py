"""Run by a test in a process of its own: `write_layout.py COMFYUI FAMILY FILE` writes a small random checkpoint.

The layout is the family's true one, as its single files have it; only widths and depths that ComfyUI does not tell
families by are reduced. Text encoders are full width, with two random layers and zeros (exact identities) above.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

comfyui, family, target = sys.argv[1:]
sys.path.insert(0, comfyui)
import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True
import comfy.supported_models  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
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
SMALL = {
    "SD 2.x": (
        comfy.supported_models.SD20,
        {
            **COMMON,
            "num_res_blocks": [1],
            "channel_mult": [1],
            "transformer_depth": [1],
            "transformer_depth_output": [1, 1],
            "transformer_depth_middle": 1,
            "adm_in_channels": None,
            "context_dim": 1024,
            "use_linear_in_transformer": True,
        },
    ),
    "SDXL": (
        comfy.supported_models.SDXL,
        {
            **COMMON,
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 1, 1],
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
random = torch.Generator().manual_seed(21)


def fill(name: str, shape: torch.Size, gain: float = 0.6) -> torch.Tensor:
    """Weights that keep a signal's size about the same through the net."""
    if len(shape) == 1:
        is_norm = name.endswith("weight")
        return torch.ones(shape) if is_norm else torch.zeros(shape)
    fan_in = shape[1:].numel()
    return torch.randn(shape, generator=random) * gain / fan_in**0.5


def open_clip(width: int, layers: int, prefix: str) -> dict[str, torch.Tensor]:
    """A text encoder in OpenCLIP's layout, as SD 2.x and SDXL files have it."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, width),
    }
    for layer in range(layers):
        for name, shape in {
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width),
            "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width),
            "mlp.c_proj.bias": (width,),
        }.items():
            shapes[f"transformer.resblocks.{layer}.{name}"] = shape
    made = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        is_zero = parts[0] == "transformer" and int(parts[2]) >= 2
        gain = 20.0 if "embedding" in name else 0.6
        made[prefix + name] = (
            torch.zeros(shape, dtype=torch.float16) if is_zero else fill(name, torch.Size(shape), gain).half()
        )
    return made


def main() -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("tiny", ROOT / "tests" / "tiny.py")
    assert spec is not None and spec.loader is not None
    tiny = module_from_spec(spec)
    spec.loader.exec_module(tiny)
    kind, config = SMALL[family]
    model = kind(dict(config)).get_model({}, "", device=torch.device("meta"))
    state = {
        f"model.{name}": fill(name, tensor.shape).half()
        for name, tensor in model.state_dict().items()
        if name.startswith("diffusion_model.")
    }
    vae = tiny.autoencoder(5)
    if family == "SDXL":
        vae["first_stage_model.vae_scale"] = torch.tensor(0.13025)
        clip_l = tiny.text_encoder(4)
        state |= {
            f"conditioner.embedders.0.transformer.{name.split('transformer.', 1)[1]}": tensor
            for name, tensor in clip_l.items()
        }
        state |= open_clip(1280, 32, "conditioner.embedders.1.model.")
    else:
        state |= open_clip(1024, 24, "cond_stage_model.model.")
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in (state | vae).items()}, target)


main()
