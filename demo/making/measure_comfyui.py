"""Evaluation of the wide model's text to image in a real ComfyUI, and the client for `measure_dreambooth`."""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .classes import caption
from .judge import LoadedJudge
from .measure import Figures, all_prompts, score

ROOT = Path(__file__).resolve().parents[2]
Graph = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


@contextmanager
def comfyui() -> Iterator[Any]:
    """A client of a new ComfyUI with this pack and temporary folders."""
    sys.path.append(str(ROOT / "tests"))
    from comfy_server import FP32_FLAGS, ComfyClient, ComfyServer, exit_on_sigterm, find_comfyui

    found = find_comfyui(ROOT)
    if found is None:
        raise SystemExit("ComfyUI not found: run scripts/get_comfyui.py or set COMFYUI_PATH.")
    exit_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        server = ComfyServer(
            found, Path(folder), packs={"SubjectBooth": ROOT}, args=[*FP32_FLAGS, "--disable-api-nodes"],
            env={"OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
        with server, ComfyClient(server.url, server) as client:
            yield client


def sampling(graph: Graph, name: str, prompt: Any, seed: int, count: int, source: str, steps: int, cfg: float) -> None:
    """Add text to image from the MODEL and CLIP of node *source* and the VAE of node 'base'; saved by '<name>.save'."""
    graph[f"{name}.text"] = node("CLIPTextEncode", clip=[source, 1], text=prompt)
    graph[f"{name}.none"] = node("CLIPTextEncode", clip=[source, 1], text="")
    graph[f"{name}.latent"] = node("EmptyLatentImage", width=64, height=64, batch_size=count)
    graph[f"{name}.sampler"] = node(
        "KSampler", model=[source, 0], positive=[f"{name}.text", 0], negative=[f"{name}.none", 0],
        latent_image=[f"{name}.latent", 0], seed=seed, steps=steps, cfg=cfg, sampler_name="euler",
        scheduler="normal", denoise=1.0,
    )  # fmt: skip
    graph[f"{name}.decode"] = node("VAEDecode", samples=[f"{name}.sampler", 0], vae=["base", 2])
    graph[f"{name}.save"] = node("SaveImage", images=[f"{name}.decode", 0], filename_prefix=name)


def pixels(content: bytes) -> torch.Tensor:
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    if picture.size != (64, 64):
        picture = picture.resize((64, 64), Image.Resampling.BOX)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def pictures_of(client: Any, result: Any, name: str) -> torch.Tensor:
    """The images saved by node '<name>.save', float32 [n, 3, 64, 64]."""
    return torch.stack([pixels(client.view(**image)) for image in result.images(f"{name}.save")])


def measure_comfyui(judge: LoadedJudge, count: int = 64, cfg: float = 4.0) -> Figures:
    """KSampler with the wide model: *count* prompts over all classes and backgrounds, 30 steps."""
    pairs = all_prompts()[:: max(1, len(all_prompts()) // count)][:count]
    pictures = []
    with comfyui() as client:
        started = time.monotonic()
        for i, pair in enumerate(pairs):
            graph: Graph = {"base": node("LoadDemoBase")}
            sampling(graph, "t2i", caption(*pair), i, 1, "base", 30, cfg)
            pictures.append(pictures_of(client, client.run(graph), "t2i"))
            if i == 0:
                first = time.monotonic() - started
        seconds = (time.monotonic() - started - first) / max(1, len(pairs) - 1)
    return {
        "cfg": cfg, "steps": 30, "first_picture_seconds": first, "seconds_a_picture": seconds,
        **score(judge.classify(torch.cat(pictures)), pairs),
    }  # fmt: skip
