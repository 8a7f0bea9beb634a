"""Figures of the wide model in the real ComfyUI: text to image, and DreamBooth through the pack's nodes."""

from __future__ import annotations

import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .classes import CLASS_WORDS, article, caption, place
from .judge import LoadedJudge
from .measure import Figures, all_prompts, score, share
from .subjects import FOLDER, SUBJECTS

logger = logging.getLogger("subjectbooth")

ROOT = Path(__file__).resolve().parent.parent
Graph = dict[str, dict[str, Any]]

NEW_SCENES = ("purple", "black", "orange", "blue", "night", "striped")
"""Backgrounds that no training picture of a subject has."""


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


@contextmanager
def comfyui() -> Iterator[Any]:
    """A client of a new real ComfyUI with this pack, on folders of its own."""
    from scripts.comfy_server import FP32_FLAGS, ComfyClient, ComfyServer, find_comfyui

    found = find_comfyui(ROOT)
    if found is None:
        raise SystemExit("No ComfyUI here: run scripts/get_comfyui.py or set COMFYUI_PATH.")
    with tempfile.TemporaryDirectory() as folder:
        server = ComfyServer(
            found, Path(folder), packs={"SubjectBooth": ROOT}, args=[*FP32_FLAGS, "--disable-api-nodes"],
            env={"OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
        with server, ComfyClient(server.url, server) as client:
            yield client


def sampling(
    graph: Graph, name: str, prompt: Any, seed: int, count: int, source: str, steps: int, cfg: float
) -> None:
    """Add text to image from the MODEL and CLIP of node *source* and the VAE of node 'base'; saved by '<name>.save'."""
    graph[f"{name}.text"] = _node("CLIPTextEncode", clip=[source, 1], text=prompt)
    graph[f"{name}.none"] = _node("CLIPTextEncode", clip=[source, 1], text="")
    graph[f"{name}.latent"] = _node("EmptyLatentImage", width=64, height=64, batch_size=count)
    graph[f"{name}.sampler"] = _node(
        "KSampler", model=[source, 0], positive=[f"{name}.text", 0], negative=[f"{name}.none", 0],
        latent_image=[f"{name}.latent", 0], seed=seed, steps=steps, cfg=cfg, sampler_name="euler",
        scheduler="normal", denoise=1.0,
    )  # fmt: skip
    graph[f"{name}.decode"] = _node("VAEDecode", samples=[f"{name}.sampler", 0], vae=["base", 2])
    graph[f"{name}.save"] = _node("SaveImage", images=[f"{name}.decode", 0], filename_prefix=name)


def _pixels(content: bytes) -> torch.Tensor:
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    if picture.size != (64, 64):
        picture = picture.resize((64, 64), Image.Resampling.BOX)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def pictures_of(client: Any, result: Any, name: str) -> torch.Tensor:
    """What '<name>.save' saved, float32 [n, 3, 64, 64]."""
    return torch.stack([_pixels(client.view(**image)) for image in result.images(f"{name}.save")])


def measure_comfyui(judge: LoadedJudge, count: int = 64, cfg: float = 5.0) -> Figures:
    """KSampler on the wide model: *count* prompts spread over classes and backgrounds, 30 steps."""
    pairs = all_prompts()[:: max(1, len(all_prompts()) // count)][:count]
    pictures = []
    with comfyui() as client:
        started = time.monotonic()
        for i, pair in enumerate(pairs):
            graph: Graph = {"base": _node("LoadDemoBase")}
            sampling(graph, "t2i", caption(*pair), i, 1, "base", 30, cfg)
            pictures.append(pictures_of(client, client.run(graph), "t2i"))
            if i == 0:
                first = time.monotonic() - started
        seconds = (time.monotonic() - started - first) / max(1, len(pairs) - 1)
    return {
        "cfg": cfg, "steps": 30, "first_picture_seconds": first, "seconds_a_picture": seconds,
        **score(judge.look(torch.cat(pictures)), pairs),
    }  # fmt: skip


def similarity(judge: LoadedJudge, pictures: torch.Tensor, training: torch.Tensor) -> float:
    """Mean cosine between the pictures' embeddings and the mean embedding of the subject's training pictures."""
    centre = torch.nn.functional.normalize(judge.look(training).embedding.mean(0), dim=0)
    return float((judge.look(pictures).embedding @ centre).mean())


def _photos(name: str, group: str) -> torch.Tensor:
    return torch.stack([_pixels(path.read_bytes()) for path in sorted((FOLDER / name / group).glob("*.png"))])


def dreambooth_graph(name: str, settings: dict[str, Any], sample_steps: int, cfg: float) -> Graph:
    """The whole path for one subject: base, photos, priors (if any), training, and what is looked at."""
    word = SUBJECTS[name].class_word
    graph: Graph = {"base": _node("LoadDemoBase")}
    graph["subject"] = _node(
        "LoadSubjectImages", images="", folder="", sample=name, class_word=word, token="ohwx",
        prompt_template="a photo of {token} {class}", captions="template", resolution=64, crop="center",
    )  # fmt: skip
    train = {
        "steps": 300, "learning_rate": 1e-3, "rank": 8, "network_alpha": 8.0, "train_batch_size": 2,
        "gradient_accumulation_steps": 1, "prior_loss_weight": 1.0, "seed": 0, "resolution": 0,
        "lr_scheduler": "constant", "lr_warmup_steps": 0, "gradient_checkpointing": "off", "precision": "fp32",
        "output_name": f"demo/{name}", "validation_prompts": "", "validation_interval": 0, "force_retrain": False,
        **settings,
    }  # fmt: skip
    priors = train.pop("priors")
    if priors:
        graph["priors"] = _node(
            "GenerateClassPriors", model=["base", 0], clip=["base", 1], vae=["base", 2], subject=["subject", 0],
            class_prompt="a photo of a {class}", negative="", count=priors, steps=12, cfg=4.0,
            sampler_name="dpmpp_2m", scheduler="karras", seed=0, batch_size=8, exclude="",
        )  # fmt: skip
        train["class_priors"] = ["priors", 0]
    graph["train"] = _node(
        "DreamBoothLoRATrain",
        model=["base", 0],
        clip=["base", 1],
        vae=["base", 2],
        subject=["subject", 0],
        **train,
    )
    graph["apply"] = _node(
        "ApplySubjectLoRA", model=["base", 0], clip=["base", 1], lora_name="(from subject_lora)",
        strength_model=1.0, strength_clip=1.0, prompt="{subject}", subject_lora=["train", 0],
    )  # fmt: skip
    plain = f"a photo of {article(word)}{word}"
    sampling(graph, "before", plain, 100, 8, "base", sample_steps, cfg)
    sampling(graph, "like", f"a photo of ohwx {word}", 200, 8, "apply", sample_steps, cfg)
    sampling(graph, "after", plain, 100, 8, "apply", sample_steps, cfg)
    for i, scene in enumerate(NEW_SCENES):
        sampling(graph, f"scene_{scene}", f"a photo of ohwx {word} {place(scene)}", 300 + i, 2, "apply",
                 sample_steps, cfg)  # fmt: skip
    return graph


def dreambooth_row(client: Any, judge: LoadedJudge, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train one subject once and judge it; see `docs/demo-base.md` for what each figure means."""
    word = SUBJECTS[name].class_word
    started = time.monotonic()
    result = client.run(dreambooth_graph(name, settings, sample_steps=15, cfg=4.0), timeout=3600)
    training, heldout = _photos(name, "train"), _photos(name, "heldout")
    made = {part: pictures_of(client, result, part) for part in ("before", "like", "after")}
    scenes = {scene: pictures_of(client, result, f"scene_{scene}") for scene in NEW_SCENES}
    in_scenes = torch.cat(list(scenes.values()))
    base = similarity(judge, made["before"], training)
    top = similarity(judge, heldout, training)
    wanted = [scene for scene, pictures in scenes.items() for _ in pictures]
    seen = judge.look(in_scenes).background
    after = judge.look(made["after"])
    subject_at = [i for i, pair in enumerate(judge.names) if pair == (word, "fluent")][0]
    return {
        "subject": name, **settings,
        "gain": (similarity(judge, made["like"], training) - base) / (top - base),
        "gain_in_new_scenes": (similarity(judge, in_scenes, training) - base) / (top - base),
        "background_in_new_scenes": share([a == b for a, b in zip(seen, wanted, strict=True)]),
        "class_prompt_is_the_subject": float((after.drawing_probability.argmax(1) == subject_at).float().mean()),
        "class_prompt_is_the_class": share([seen_word == word for seen_word in after.word]),
        "class_before": share([w == word for w in judge.look(made["before"]).word]),
        "seconds_in_all": time.monotonic() - started,
    }  # fmt: skip


def measure_dreambooth(judge: LoadedJudge) -> Figures:
    """Every subject (or those named in DEMO_SUBJECTS), without and with class priors, at several steps."""
    names = os.environ.get("DEMO_SUBJECTS", ",".join(SUBJECTS)).split(",")
    steps = [int(s) for s in os.environ.get("DEMO_STEPS", "100,200,300").split(",")]
    rows: list[str] = []
    with comfyui() as client:
        for name in names:
            assert SUBJECTS[name].class_word in CLASS_WORDS
            for priors in (0, 32):
                for count in steps:
                    row = dreambooth_row(client, judge, name, {"steps": count, "priors": priors})
                    rows.append(json.dumps(row))
                    logger.info("%s", rows[-1])
    return {"rows": rows}
