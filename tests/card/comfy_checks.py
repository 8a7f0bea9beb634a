"""What only a GPU can show, inside ComfyUI. See :mod:`tests.card.checks`."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch

from subjectbooth.scripts import full_size
from subjectbooth.tests import tiny
from subjectbooth.tests.comfy_server import ComfyClient, ComfyServer, copy_file

from .bench import Bench, NotHere
from .checks import CHECKS

ROOT = Path(__file__).resolve().parent.parent.parent
STARTED = "DynamicVRAM support detected and enabled"
"""What ComfyUI logs."""


@dataclass
class Given:
    """What one graph gave: train, apply, sample.

    Attributes:
        key: of the run.
        lora: its tensors.
        picture: float32 [h, w, 3] in 0..1.
        log: of ComfyUI.
    """

    key: str
    lora: dict[str, torch.Tensor]
    picture: torch.Tensor
    log: str


def dynamic_vram(bench: Bench) -> str:
    """With dynamic VRAM and without: the same run key, and near the same LoRA and picture.

    On a CPU there is none; there this only sees that two servers agree.
    """
    if bench.comfyui is None:
        raise NotHere("needs COMFYUI_PATH, a ComfyUI of 0.33 or newer whose requirements are installed here")
    if "disable-dynamic-vram" not in (bench.comfyui / "comfy" / "cli_args.py").read_text("utf-8"):
        raise NotHere("this ComfyUI is older than 0.33 and has no dynamic VRAM")
    on, off = _given(bench, []), _given(bench, ["--disable-dynamic-vram"])
    if bench.device.type == "cuda" and STARTED not in on.log:
        raise NotHere("ComfyUI did not turn dynamic VRAM on: it needs the package comfy-aimdo and torch 2.8")
    assert STARTED not in off.log, "it is on in spite of the switch"
    assert on.key == off.key, f"run keys {on.key[:12]} and {off.key[:12]}"
    assert on.lora.keys() == off.lora.keys(), "LoRA files of other layers"
    weights = max(float((on.lora[name] - tensor).abs().max()) for name, tensor in off.lora.items())
    pictures = float((on.picture - off.picture).abs().max())
    figure = f"run keys equal, weights within {weights:.1e}, pictures within {pictures * 255:.0f} of 255"
    assert weights <= 1e-4 and pictures <= 8 / 255, figure
    return figure


def _given(bench: Bench, arguments: Sequence[str]) -> Given:
    from PIL import Image

    assert bench.comfyui is not None
    with tempfile.TemporaryDirectory(prefix="check_gpu_") as scratch:
        server = ComfyServer(
            bench.comfyui,
            Path(scratch),
            packs={"SubjectBooth": ROOT},
            args=[*arguments, "--disable-api-nodes"],
            cpu=bench.device.type == "cpu",
        )
        copy_file(
            tiny.tiny_checkpoint(ROOT / ".cache" / "tiny"), server.models_dir / "checkpoints" / full_size.CHECKPOINT
        )
        with server, ComfyClient(server.url, server) as client:
            photos = client.upload_images(sorted(full_size.PHOTOS.glob("*"))[:2])
            result = client.run(full_size.graph(client, photos), timeout=300)
            shown = result.images("7")[0]
            picture = Image.open(io.BytesIO(client.view(**shown))).convert("RGB")
        files = list((server.models_dir / "loras").rglob("*.safetensors"))
        assert len(files) == 1, f"{len(files)} LoRA files"
        with safetensors.safe_open(files[0], "pt") as file:
            key = file.metadata()["subjectbooth.run_key"]
            lora = {name: file.get_tensor(name).float() for name in file.keys()}
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() / 255
        return Given(key, lora, pixels.reshape(picture.height, picture.width, 3), server.log())


ALL: dict[str, Callable[[Bench], str]] = {**CHECKS, "dynamic VRAM": dynamic_vram}
