"""Workflows with the pack's nodes, and the photographs they train on."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

from subjectbooth.tests.nodes.graphs import Graph, node, text_to_image

SIZE = 64


@cache
def cat_photos() -> tuple[bytes, ...]:
    """Three crops of one real photograph of a cat (scikit-image's chelsea), as PNG files."""
    import skimage.data
    from PIL import Image

    cat = Image.fromarray(skimage.data.chelsea())
    files = []
    for box in ((60, 0, 360, 300), (100, 20, 340, 260), (40, 10, 320, 290)):
        buffer = io.BytesIO()
        cat.crop(box).resize((192, 192)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return tuple(files)


def upload_cat(client: Any) -> list[str]:
    return [client.upload_image(photo, f"cat_{number}.png") for number, photo in enumerate(cat_photos())]


def subject_node(images: list[str], **changes: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "images": {"__value__": images},
        "folder": "",
        "sample": "none",
        "class_word": "cat",
        "token": "ohwx",
        "prompt_template": "a photo of {token} {class}",
        "captions": "template",
        "resolution": SIZE,
        "crop": "center",
    }
    return node("LoadSubjectImages", **{**inputs, **changes})


def train_node(model: Any = ("1", 0), clip: Any = ("1", 1), **changes: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "model": list(model),
        "clip": list(clip),
        "vae": ["1", 2],
        "subject": ["10", 0],
        "steps": 3,
        "learning_rate": 1e-3,
        "rank": 4,
        "network_alpha": 2.0,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "prior_loss_weight": 1.0,
        "seed": 0,
        "resolution": 0,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "gradient_checkpointing": "auto",
        "precision": "auto",
        "output_name": "cat",
        "validation_prompts": "",
        "validation_interval": 0,
        "force_retrain": False,
        # The default studies the base first, which most tests have no use for.
        "preservation": "class_images" if "class_priors" in changes else "none",
    }
    return node("DreamBoothLoRATrain", **{**inputs, **changes})


def apply_node(model: Any = ("1", 0), clip: Any = ("1", 1), **changes: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "model": list(model),
        "clip": list(clip),
        "lora_name": "(from subject_lora)",
        "strength_model": 1.0,
        "strength_clip": 1.0,
        "prompt": "a photo of {subject}",
        "subject_lora": ["11", 0],
    }
    return node("ApplySubjectLoRA", **{**inputs, **changes})


def train_and_sample(images: list[str], *, seed: int = 1, apply: dict[str, Any] | None = None, **train: Any) -> Graph:
    """ "1" checkpoint, "10" subject, "11" trainer, "12" apply, then text to image "2".."7" with what it gives."""
    graph = text_to_image(seed=seed, model=["12", 0], clip=["12", 1], positive=["12", 2])
    graph["10"] = subject_node(images)
    graph["11"] = train_node(**train)
    graph["12"] = apply_node(**(apply or {}))
    return graph
