"""Evaluation of DreamBooth on the demo base with the pack's nodes in a real ComfyUI: ways to keep the class.

`docs/demo-base.md` explains the figures. Each row is saved when it is done, so that an interrupted evaluation resumes.
The environment variables DEMO_SUBJECTS (names) and DEMO_STEPS (numbers) select a subset.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ..base import manifest, sha256_of
from .classes import caption, place
from .gain import CFG, PICTURES, SAMPLE_STEPS, Scale, photos, scale_of
from .judge import WEIGHTS as JUDGE
from .judge import LoadedJudge, Verdict
from .judge_embedder import OTHER_CAPTIONS
from .kept_pictures import Pictures, keep_pictures, kept_pictures
from .measure import Figures, share
from .measure_comfyui import Graph, comfyui, node, pictures_of, sampling
from .strips import Run, strip, strip_name
from .subjects import SUBJECTS

logger = logging.getLogger("subjectbooth")

# This package has two names (see files.py), and the trainer is next to it under both.
_figures: Any = import_module(f"{__name__.removesuffix('demo.making.measure_dreambooth')}trainer.measure.figures")

NEW_SCENES = ("purple", "black", "orange", "blue", "night", "striped")
"""Backgrounds that are in none of the training photos."""

CLASS_IMAGES = 32
PICTURES_OF_A_SCENE = 4
SCENES_OF_PICTURES = tuple(scene for scene in NEW_SCENES for _ in range(PICTURES_OF_A_SCENE))
"""The scene of each image in new scenes, in order."""
CLASS_CFG = 1.0
"""Class images are sampled without guidance; see docs/demo-base-log.md."""
SERIES = ("dog", "clock")
"""Subjects that are evaluated at several steps, to show overfitting and drift."""
STEPS = 290
SERIES_STEPS = (100, 200, STEPS, 400, 800)

SETTINGS: dict[str, Any] = {
    "learning_rate": 1.5e-3, "rank": 8, "network_alpha": 8.0, "train_batch_size": 2,
    "gradient_accumulation_steps": 1, "prior_loss_weight": 0.5, "seed": 0, "resolution": 0,
    "lr_scheduler": "constant", "lr_warmup_steps": 0, "gradient_checkpointing": "off", "precision": "fp32",
    "validation_prompts": "", "validation_interval": 0, "force_retrain": False,
}  # fmt: skip
OPTIONS: dict[str, Any] = {"lora_targets": "all", "snr_gamma": 20.0, "ema_decay": 0.96}
"""Settings of the node DreamBoothOptions that differ from its defaults."""
WAYS: dict[str, dict[str, Any]] = {
    "curvature": {"prior_loss_weight": 1.0, "class_images": 0},
    "class_images": {"class_images": CLASS_IMAGES},
    "none": {"class_images": 0},
}
"""By the value of `preservation`: settings of its runs, the default first. The goals refer to that one."""
DEFAULT_WAY = next(iter(WAYS))
SHEETS: dict[str, list[Run]] = {
    "demo-base-dreambooth.jpg": [(name, way, STEPS) for name in SUBJECTS for way in WAYS],
    "demo-base-steps.jpg": [(name, way, count) for name in SERIES for way in WAYS for count in SERIES_STEPS],
}
"""The runs shown in each image in docs/, by file name."""
DRIFT_SEEDS = 2
DRIFT_BACKGROUNDS = ("beach", "blue", "striped")
"""Of the class prompts whose drift is measured, beside the plain one."""


def dreambooth_graph(name: str, settings: dict[str, Any], options: dict[str, Any], with_drift: bool = False) -> Graph:
    """The whole graph for one subject: base, photos, class images (if any), training, and the images to evaluate.

    Args:
        settings: inputs of DreamBoothLoRATrain, and `class_images`, their number.
        options: all inputs of DreamBoothOptions.
        with_drift: whether EvaluateSubjectLoRA also draws the prompts whose drift is measured.
    """
    word = SUBJECTS[name].class_word
    train = dict(settings)
    class_images = train.pop("class_images")
    graph: Graph = {"base": node("LoadDemoBase")}
    wired = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2], "subject": ["subject", 0]}
    graph["subject"] = node(
        "LoadSubjectImages", images="", folder="", sample=name, class_word=word, token="ohwx",
        prompt_template="a photo of {token} {class}", captions="template", resolution=64, crop="center",
    )  # fmt: skip
    if class_images:
        graph["priors"] = node(
            "GenerateClassPriors", **wired, class_prompt="a photo of a {class}", negative="", count=class_images,
            steps=12, cfg=CLASS_CFG, sampler_name="dpmpp_2m", scheduler="karras", seed=0, batch_size=8, exclude="",
        )  # fmt: skip
        train["class_priors"] = ["priors", 0]
    graph["options"] = node("DreamBoothOptions", **options)
    train["options"] = ["options", 0]
    graph["train"] = node("DreamBoothLoRATrain", **wired, output_name=f"demo/{name}", **train)
    graph["apply"] = node(
        "ApplySubjectLoRA", model=["base", 0], clip=["base", 1], lora_name="(from subject_lora)",
        strength_model=1.0, strength_clip=1.0, prompt="{subject}", subject_lora=["train", 0],
    )  # fmt: skip
    plain = caption(word, None)

    def look(part: str, prompt: str, seed: int, count: int, source: str) -> None:
        sampling(graph, part, prompt, seed, count, source, SAMPLE_STEPS, CFG)

    look("before", plain, 100, PICTURES, "base")
    look("like", f"a photo of ohwx {word}", 200, PICTURES, "apply")
    look("after", plain, 100, PICTURES, "apply")
    for i, scene in enumerate(NEW_SCENES):
        look(f"scene_{scene}", f"a photo of ohwx {word} {place(scene)}", 300 + i, PICTURES_OF_A_SCENE, "apply")
    if with_drift:
        graph["evaluate"] = node(
            "EvaluateSubjectLoRA", **wired, lora_name="(from subject_lora)", strength=1.0, subject_lora=["train", 0],
            prompts="\n".join(f"a photo of {{subject}} {place(scene)}" for scene in DRIFT_BACKGROUNDS),
            seeds=DRIFT_SEEDS, steps=SAMPLE_STEPS, cfg=CFG, sampler_name="euler", scheduler="normal", seed=5000,
            resolution=0,
        )  # fmt: skip
        for part, slot in (("drift_before", 3), ("drift_after", 4)):
            graph[f"{part}.save"] = node("SaveImage", images=["evaluate", slot], filename_prefix=part)
    return graph


PARTS = ("before", "like", "after", "drift_before", "drift_after")


def drift_of(judge: LoadedJudge, before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """The drift of the class and of other things, from all pictures of EvaluateSubjectLoRA without and with the LoRA.

    They are in the order of its prompts: of the class, of others, of the subject, with DRIFT_SEEDS pictures each.
    """
    embedded = [judge.classify(pictures).embedding.unflatten(0, (-1, DRIFT_SEEDS)) for pictures in (before, after)]
    classes = 1 + len(DRIFT_BACKGROUNDS)
    groups = {"class": slice(classes), "others": slice(classes, classes + len(OTHER_CAPTIONS))}
    return {
        f"drift_{group}": float(_figures.drift(*(vectors[rows] for vectors in embedded)).mean())
        for group, rows in groups.items()
    }


def figures_of(scale: Scale, like: torch.Tensor, scenes: torch.Tensor, after: Verdict, word: str) -> dict[str, float]:
    """The figures that have goals.

    Args:
        like: images of a prompt like the training prompt.
        scenes: images in the scenes of SCENES_OF_PICTURES.
        after: the judge's results for images of the plain class prompt of the class *word*.
    """
    judge = scale.judge
    subject_at = judge.names.index((word, "fluent"))
    return {
        "gain": scale.gain(like),
        "gain_in_new_scenes": scale.gain(scenes),
        "background_in_new_scenes": share(
            [a == b for a, b in zip(judge.classify(scenes).background, SCENES_OF_PICTURES, strict=True)]
        ),
        "class_prompt_is_the_subject": share([i == subject_at for i in after.drawing_probability.argmax(1).tolist()]),
    }  # fmt: skip


def pictures_of_run(client: Any, name: str, settings: dict[str, Any]) -> Pictures:
    """Train one subject and return the images to evaluate; 'scenes' are in the order of SCENES_OF_PICTURES."""
    options = {**client.defaults("DreamBoothOptions"), **OPTIONS}
    result = client.run(dreambooth_graph(name, {**SETTINGS, **settings}, options, with_drift=True), timeout=3600)
    made = {part: pictures_of(client, result, part) for part in PARTS}
    made["scenes"] = torch.cat([pictures_of(client, result, f"scene_{scene}") for scene in NEW_SCENES])
    return made


def dreambooth_row(judge: LoadedJudge, name: str, settings: dict[str, Any], made: Pictures) -> dict[str, Any]:
    """The figures of one run's images."""
    word = SUBJECTS[name].class_word
    scale = scale_of(judge, name, made["before"])
    after = judge.classify(made["after"])
    return {
        "subject": name, **settings,
        **figures_of(scale, made["like"], made["scenes"], after, word),
        "class_prompt_is_the_class": share([seen == word for seen in after.word]),
        "class_before": share([seen == word for seen in judge.classify(made["before"]).word]),
        **(drift_of(judge, made["drift_before"], made["drift_after"]) if "drift_before" in made else {}),
    }  # fmt: skip


def requested_subjects() -> list[str]:
    """The subjects in the environment variable DEMO_SUBJECTS; default: all."""
    return os.environ.get("DEMO_SUBJECTS", ",".join(SUBJECTS)).split(",")


def planned(names: list[str], steps: list[int]) -> list[Run]:
    """The runs in SHEETS of these subjects and numbers of steps (all, if empty).

    Runs of the default way come first, because the goals refer to it; a subject's runs continue one another.
    """
    runs = {run for sheet in SHEETS.values() for run in sheet}
    asked = [(name, way, count) for name, way, count in runs if name in names and (not steps or count in steps)]
    return sorted(asked, key=lambda run: (list(WAYS).index(run[1]), names.index(run[0]), run[2]))


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The worst and the mean value of each figure over the runs of STEPS steps that keep the class the default way."""
    final = [row for row in rows.values() if row["steps"] == STEPS and row["preservation"] == DEFAULT_WAY]
    figures: dict[str, float] = {}
    for name in ("gain", "gain_in_new_scenes", "background_in_new_scenes"):
        if final:
            figures[f"{name}_worst"] = min(row[name] for row in final)
            figures[f"{name}_mean"] = mean(row[name] for row in final)
    if final:
        figures["class_prompt_is_the_subject_worst"] = max(row["class_prompt_is_the_subject"] for row in final)
        for name in ("drift_class", "drift_others"):
            if drifts := [row[name] for row in final if name in row]:
                figures[f"{name}_mean"] = mean(drifts)
    return figures


def measure_dreambooth(judge: LoadedJudge, kept: Figures, keep: Callable[[Figures], None], folder: Path) -> Figures:
    """Evaluate all subjects, with each way to keep the class.

    Args:
        kept: earlier results; reused if the weights, the judge and the settings are the same.
        keep: called with the figures after every row.
        folder: for the images and the strip of each row. With another judge, the images are reused.
    """
    names = requested_subjects()
    steps = [int(count) for count in os.environ.get("DEMO_STEPS", "").split(",") if count]
    how = {
        "weights": manifest()["weights"], "settings": {**SETTINGS, **OPTIONS},
        "pictures": [PICTURES, PICTURES_OF_A_SCENE], "sampled": [SAMPLE_STEPS, CFG],
    }  # fmt: skip
    judged = {**how, "judge": sha256_of(JUDGE)}
    rows: dict[str, dict[str, Any]] = {}
    if all(kept.get(name) == value for name, value in judged.items()):
        rows = dict(kept["rows"])

    def add(run: Run, made: Pictures) -> None:
        name, way, count = run
        key = _key(run)
        about = {"steps": count, "preservation": way, "class_images": WAYS[way]["class_images"]}
        rows[key] = dreambooth_row(judge, name, about, made)
        logger.info("%s: %s", key, rows[key])
        strip({"photos": photos(name, "train"), **made}, PICTURES_OF_A_SCENE).save(folder / strip_name(run))
        keep({**summary(rows), **judged, "rows": rows})

    runs = [run for run in planned(names, steps) if _key(run) not in rows]
    folder.mkdir(parents=True, exist_ok=True)
    files = {run: (folder / strip_name(run)).with_suffix(".pt") for run in runs}
    for run in runs:
        if made := kept_pictures(files[run], how):
            add(run, made)
    if missing := [run for run in runs if _key(run) not in rows]:
        with comfyui() as client:
            for run in missing:
                name, way, count = run
                made = pictures_of_run(client, name, {"steps": count, "preservation": way, **WAYS[way]})
                keep_pictures(files[run], made, how)
                add(run, made)
    return {**summary(rows), **judged, "rows": rows}


def _key(run: Run) -> str:
    name, way, count = run
    return f"{name}, {way}, {count} steps"
