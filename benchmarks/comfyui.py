"""The contestants that train in ComfyUI: a real one for each run, driven over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subjectbooth.tests.comfy_server import FP32_FLAGS, ComfyClient, ComfyServer, copy_file

from .recorder import steps_of
from .scene import CLASS, LEARNING_RATE, TRIGGER, Scene

if TYPE_CHECKING:
    from .contestants import Places, Run

ROOT = Path(__file__).resolve().parent.parent
HOOK = Path(__file__).parent / "comfy_hook"
FLAGS = {"fp32": FP32_FLAGS, "bf16": ("--bf16-unet",), "fp16": ("--fp16-unet",)}
TIMEOUT = 3600.0

Graph = dict[str, dict[str, Any]]


def wired(has_class: bool) -> Run:
    """This project's nodes, which train on ComfyUI's own module."""

    def graph(client: ComfyClient, scene: Scene, photos: list[str], steps: int) -> Graph:
        return _our_graph(client, scene, photos, steps, has_class)

    def run(scene: Scene, places: Places, output: Path, counts: bool) -> dict[str, Any]:
        return _run(graph, scene, places, output, counts)

    return run


def core() -> Run:
    """ComfyUI's own Train LoRA."""

    def run(scene: Scene, places: Places, output: Path, counts: bool) -> dict[str, Any]:
        return _run(_core_graph, scene, places, output, counts)

    return run


def _run(
    make: Callable[[ComfyClient, Scene, list[str], int], Graph],
    scene: Scene,
    places: Places,
    output: Path,
    counts: bool,
) -> dict[str, Any]:
    from .contestants import ContestantFailed, environment

    assert places.comfyui is not None
    out = output.with_suffix(".json")
    out.unlink(missing_ok=True)
    started = time.monotonic()
    settings = {
        "scene": scene.to_json(),
        "out": str(out),
        "counts": counts,
        "started": started,
    }
    server = ComfyServer(
        places.comfyui,
        places.scratch / "comfyui",  # class images stay there
        packs={"SubjectBooth": ROOT, "benchmark_hook": HOOK},
        args=[*FLAGS[scene.precision], "--disable-api-nodes"],
        env={**environment(scene), "SUBJECTBOOTH_BENCHMARK": json.dumps(settings)},
        cpu=scene.device == "cpu",
    )
    copy_file(scene.checkpoint, server.models_dir / "checkpoints" / scene.checkpoint.name)
    with server, ComfyClient(server.url, server) as client:
        photos = client.upload_images(sorted(scene.photo_folder.glob("*.png")), subfolder=scene.photo_folder.name)
        client.run(make(client, scene, photos, steps_of(scene, counts)), timeout=TIMEOUT)
        whole = time.monotonic() - started
        if not out.is_file():
            raise ContestantFailed(f"ComfyUI trained too few steps\n{server.log_tail()}")
    return {**json.loads(out.read_text("utf-8")), "whole": whole}


def _our_graph(client: ComfyClient, scene: Scene, photos: list[str], steps: int, has_class: bool) -> Graph:
    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": {**client.defaults(kind), **inputs}}

    parts = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name=scene.checkpoint.name),
        "10": node(
            "LoadSubjectImages",
            images={"__value__": photos},
            sample="none",
            class_word=CLASS,
            resolution=scene.resolution,
            crop="center",
        ),
        "11": node(
            "DreamBoothLoRATrain",
            **parts,
            subject=["10", 0],
            steps=steps,
            learning_rate=LEARNING_RATE,
            rank=scene.rank,
            network_alpha=float(scene.rank),
            train_batch_size=scene.batch,
            gradient_checkpointing="off",
            precision=scene.precision,
            validation_prompts="",
            output_name="benchmark",
            force_retrain=True,
            preservation="class_images" if has_class else "none",
        ),
    }
    if has_class:
        graph["12"] = node(
            "GenerateClassPriors", **parts, subject=["10", 0], count=scene.class_images, steps=2, cfg=1.0
        )
        graph["11"]["inputs"]["class_priors"] = ["12", 0]
    return graph


def _core_graph(client: ComfyClient, scene: Scene, photos: list[str], steps: int) -> Graph:
    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": {**client.defaults(kind), **inputs}}

    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name=scene.checkpoint.name),
        "2": node("CLIPTextEncode", clip=["1", 1], text=f"a photo of {TRIGGER}"),
        "3": node("VAEEncode", pixels=["", 0], vae=["1", 2]),
        "4": node(
            "TrainLoraNode",
            model=["1", 0],
            latents=["6", 0],
            positive=["2", 0],
            batch_size=scene.batch,
            steps=steps,
            learning_rate=LEARNING_RATE,
            rank=scene.rank,
            optimizer="AdamW",
            loss_function="MSE",
            training_dtype="fp32" if scene.precision == "fp32" else "bf16",
            lora_dtype="fp32",
            algorithm="LoRA",
            gradient_checkpointing=False,
            existing_lora="[None]",
        ),
        # The node fails on one batch: it wants a list.
        "6": node("RebatchLatents", latents=["3", 0], batch_size=1),
        "5": node("SaveLoRA", lora=["4", 1], prefix="loras/benchmark"),
    }
    images: list[list[Any]] = []
    for number, photo in enumerate(photos):
        graph[f"load{number}"] = node("LoadImage", image=photo)
        graph[f"scale{number}"] = node(
            "ImageScale",
            image=[f"load{number}", 0],
            upscale_method="bicubic",
            width=scene.resolution,
            height=scene.resolution,
            crop="center",
        )
        images.append([f"scale{number}", 0])
    together = images[0]
    for number, image in enumerate(images[1:]):
        graph[f"batch{number}"] = node("ImageBatch", image1=together, image2=image)
        together = [f"batch{number}", 0]
    graph["3"]["inputs"]["pixels"] = together
    return graph
