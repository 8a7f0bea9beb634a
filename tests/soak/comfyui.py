"""A real ComfyUI that is killed at random moments of a training, started again and given the same graph again."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_server import ComfyClient, ComfyServer, copy_file
from setup_env import ROOT, Environment
from soak.shell import CHECKPOINT_SECONDS, Place, Tally

PLANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "in ComfyUI, class images": ({}, {}),
    "in ComfyUI, class images, text encoder, EMA, accumulation, buckets": (
        {"train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"train_text_encoder": True, "ema_decay": 0.9, "enable_bucket": True},
    ),
}
"""What differs in the inputs of the training and of its options, by the name of the kind of training."""


def kill_comfyui(
    environment: Environment,
    base: Path,
    name: str,
    kills: int,
    choose: random.Random,
    scratch: Path,
    flags: Sequence[str],
    *,
    steps: int = 30,
) -> dict[str, Any]:
    """Train once in a ComfyUI that is left alone and once in one that is killed ``kills`` times; see kill_plan."""
    train, options = PLANS[name]
    servers, places = [], []
    for which in ("whole", "cut"):
        folder = scratch / which
        copy_file(base, folder / "models" / "checkpoints" / "tiny15.safetensors")
        servers.append(
            ComfyServer(
                environment.comfyui,
                folder,
                packs={"SubjectBooth": ROOT},
                python=environment.python,
                args=[*flags, "--disable-api-nodes"],
                env={"OMP_NUM_THREADS": "1"},
            )
        )
        runs = folder / "output" / "subjectbooth"
        places.append(Place(runs, runs / "class_images", folder / "models" / "loras" / "cat.safetensors"))
    (whole, cut), tally = servers, Tally(name)
    with whole:
        client = ComfyClient(whole.url, whole, listen=False)
        client.run(graph(client, steps, train, options))
    with cut:
        while tally.found["kills"] < kills:
            client = ComfyClient(cut.url, cut, listen=False)
            before = places[1].progress()
            prompt = client.queue(graph(client, steps, train, options))
            seen, delay = 0.0, choose.uniform(0.0, 3.0)
            while not seen or time.monotonic() < seen + delay:
                if not seen and (places[1].progress() > before or client.history(prompt)):
                    seen = time.monotonic()
                time.sleep(0.02)
            if client.history(prompt):  # it ended before its kill: start over, so that there is something to kill
                places[1].forget()
                cut.restart()
                continue
            cut.kill()
            tally.kill(places[1], before)
            cut.start()
        client = ComfyClient(cut.url, cut, listen=False)
        client.run(graph(client, steps, train, options))
    return tally.end(places[0].outcome() == places[1].outcome())


def graph(client: ComfyClient, steps: int, train: dict[str, Any], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Checkpoint, a sample subject, class images and training; what is not named here stays at its default."""
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": "tiny15.safetensors"}),
        "2": (
            "LoadSubjectImages",
            {"sample": "cat", "images": {"__value__": []}, "class_word": "cat", "resolution": 64},
        ),
        "3": (
            "GenerateClassPriors",
            {
                "model": ["1", 0],
                "clip": ["1", 1],
                "vae": ["1", 2],
                "subject": ["2", 0],
                "count": 6,
                "steps": 4,
                "batch_size": 2,
            },
        ),
        "4": ("DreamBoothOptions", {"checkpoint_seconds": CHECKPOINT_SECONDS, **options}),
        "5": (
            "DreamBoothLoRATrain",
            {
                "model": ["1", 0],
                "clip": ["1", 1],
                "vae": ["1", 2],
                "subject": ["2", 0],
                "class_priors": ["3", 0],
                "options": ["4", 0],
                "steps": steps,
                "rank": 4,
                "network_alpha": 4.0,
                "learning_rate": 1e-3,
                "validation_prompts": "",
                "output_name": "cat",
                **train,
            },
        ),
    }
    whole = {}
    for number, (kind, inputs) in nodes.items():
        known = client.object_info(kind)["input"]["required"]
        usual = {name: spec[1]["default"] for name, spec in known.items() if len(spec) > 1 and "default" in spec[1]}
        choices = {
            name: spec[1]["options"][0]
            for name, spec in known.items()
            if len(spec) > 1 and spec[0] == "COMBO" and "default" not in spec[1] and spec[1].get("options")
        }
        whole[number] = {"class_type": kind, "inputs": {**choices, **usual, **inputs}}
    return whole
