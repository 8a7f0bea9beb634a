"""Train full-size models with random weights for a few steps at a small resolution, and measure the memory.

    python scripts/full_size.py sd1     SD 1.5 in a real ComfyUI: train, apply, sample (measured: 6.9 GiB)
    python scripts/full_size.py sdxl    SDXL from the command line, from a diffusers folder (measured: 18.7 GiB)

Not part of the tests, because it takes minutes and more memory than most test machines have. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comfy_server import ComfyClient, ComfyServer

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "demo" / "subjects" / "cat" / "train"
CHECKPOINT = "full.safetensors"
SIZE = 64
STEPS = 2
GIB = 2**30

# As published with the original releases.
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TEXT: dict[str, dict[str, Any]] = {
    "l": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"},
    "g": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu"},
}


def main() -> int:
    from setup_env import ensure_environment  # imported here, because tests import this module from another folder

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("family", choices=("sd1", "sdxl"))
    family = options.parse_args().family
    environment = ensure_environment()
    if Path(sys.executable).resolve() != Path(environment.python).resolve():
        return subprocess.run([str(environment.python), __file__, family], check=False).returncode
    with tempfile.TemporaryDirectory(prefix="full_size_") as scratch:
        if family == "sd1":
            in_comfyui(environment.comfyui, Path(scratch))
        else:
            from_shell(environment.python, Path(scratch))
    return 0


def in_comfyui(comfyui: Path, scratch: Path) -> None:
    """Train, apply and sample in one graph. Prints the peak memory of ComfyUI's process."""
    sys.path.append(str(ROOT / "tests"))
    from comfy_server import FP32_FLAGS, ComfyClient, ComfyServer

    server = ComfyServer(comfyui, scratch, packs={"SubjectBooth": ROOT}, args=[*FP32_FLAGS, "--disable-api-nodes"])
    checkpoint = server.models_dir / "checkpoints" / CHECKPOINT
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    shapes = {f"model.diffusion_model.{ldm_name}": shape for ldm_name, shape in ldm_unet(unet_shapes("sd1")).items()}
    shapes |= {f"cond_stage_model.transformer.{name}": shape for name, shape in text_shapes("l").items()}
    shapes |= {f"first_stage_model.{name}": shape for name, shape in vae_shapes().items()}
    write_random(checkpoint, shapes)
    with server, ComfyClient(server.url, server) as client:
        images = client.upload_images(sorted(PHOTOS.glob("*"))[:2])
        began = time.monotonic()
        result = client.run(graph(client, images), timeout=3600)
        status = result.outputs["11"]["text"][0]
        print(f"{status}; {time.monotonic() - began:.0f} s; peak memory of ComfyUI: {peak_memory(server):.1f} GiB")
        if "matched" not in status or len(result.images("7")) != 1:
            raise SystemExit("training or sampling failed")


def graph(client: ComfyClient, images: list[str]) -> dict[str, Any]:
    """Load, train, apply, and sample one image; all other settings are at their defaults."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": {**client.defaults(kind), **inputs}}

    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "10": node(
            "LoadSubjectImages",
            images={"__value__": images},
            sample="none",
            class_word="cat",
            resolution=SIZE,
            crop="center",
        ),
        "11": node(
            "DreamBoothLoRATrain",
            model=["1", 0],
            clip=["1", 1],
            vae=["1", 2],
            subject=["10", 0],
            steps=STEPS,
            validation_prompts="",
            output_name="full",
        ),
        "12": node(
            "ApplySubjectLoRA", model=["1", 0], clip=["1", 1], lora_name="(from subject_lora)", subject_lora=["11", 0]
        ),
        "2": node("CLIPTextEncode", clip=["12", 1], text=["12", 2]),
        "4": node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1),
        "5": node(
            "KSampler",
            model=["12", 0],
            positive=["2", 0],
            negative=["2", 0],
            latent_image=["4", 0],
            seed=1,
            steps=1,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="full"),
    }


def from_shell(python: Path, scratch: Path) -> None:
    """Train from a diffusers folder. Prints the peak memory of the process."""
    base = scratch / "pipeline"
    write_random(base / "unet" / "diffusion_pytorch_model.fp16.safetensors", unet_shapes("sdxl"))
    write_random(base / "text_encoder" / "model.fp16.safetensors", text_shapes("l"))
    write_random(
        base / "text_encoder_2" / "model.fp16.safetensors", {**text_shapes("g"), "text_projection.weight": (1280, 1280)}
    )
    write_random(base / "vae" / "diffusion_pytorch_model.fp16.safetensors", vae_shapes())
    began = time.monotonic()
    done = subprocess.run(
        [
            str(python),
            "-m",
            "trainer",
            "--base",
            str(base),
            "--photos",
            str(PHOTOS),
            "--class-word",
            "cat",
            "--output_dir",
            str(scratch / "out"),
            "--resolution",
            str(SIZE),
            "--steps",
            str(STEPS),
            "--cpu",
        ],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / GIB
    print(f"{done.stdout.strip()}; {time.monotonic() - began:.0f} s; peak memory: {peak:.1f} GiB")
    if done.returncode or "trained:" not in done.stdout:
        raise SystemExit("training failed")


def unet(family: str, **changes: Any) -> Any:
    """A diffusers UNet with new weights; *changes*: differences from the published config."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{**UNETS[family], **changes})


def text_encoder(kind: str) -> Any:
    """A transformers text encoder with new weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = TEXT[kind]
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            intermediate_size=4 * config["hidden_size"],
            projection_dim=config["hidden_size"],
            **config,
        )
    )


def vae(**changes: Any) -> Any:
    """Stable Diffusion's VAE from diffusers with new weights; *changes*: differences from the published config."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **{
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            **changes,
        }
    )


def unet_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """The UNet's shapes, with the names of diffusers folders."""
    import torch

    with torch.device("meta"):
        model = unet(family)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def ldm_unet(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same shapes with the names of single files."""
    sys.path.insert(0, str(ROOT))  # to import the trainer
    from trainer.base.sd.ldm_unet import ldm_names

    names = ldm_names(shapes)
    return {names[name]: shape for name, shape in shapes.items()}


def text_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """The text encoder's shapes, with the prefix ``text_model.``, which transformers has dropped in new versions."""
    import torch

    with torch.device("meta"):
        model = text_encoder(kind)
    return {
        name if name.startswith("text_model.") else f"text_model.{name}": tuple(tensor.shape)
        for name, tensor in model.named_parameters()
    }


def vae_shapes() -> dict[str, tuple[int, ...]]:
    """The VAE's shapes with diffusers' names, which ComfyUI accepts too."""
    import torch

    with torch.device("meta"):
        model = vae()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def write_random(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a random fp16 .safetensors file tensor by tensor, which needs little memory."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in _random(shapes):
            file.write(tensor.numpy().tobytes())


def _random(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        if len(shape) == 1:
            yield torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.float16)
        else:
            spread = 0.5 / torch.Size(shape[1:]).numel() ** 0.5
            yield (torch.randn(shape, generator=generator) * spread).half()


def peak_memory(server: ComfyServer) -> float:
    """The peak memory of the server's process in GiB."""
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/status").read_text("utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / GIB


if __name__ == "__main__":
    sys.exit(main())
