"""The image that shows whether training worked: the photos, the class before, the subject in new scenes, the class
after.

It reuses what the example workflow has already trained: everything before the samplers is cached.
"""

from __future__ import annotations

import copy
import io
import json
import time
from collections.abc import Iterator
from typing import Any

from comfy_server import ENDS, ComfyClient, Event
from PIL import Image, ImageDraw
from setup_env import ROOT

Graph = dict[str, dict[str, Any]]

SCENES = ("on a beach", "at night", "on a purple background", "on a striped background")
"""None of these is in the photos of the sample subjects."""
SIDE, LABEL, GAP = 160, 20, 4
SEED = 1


def grid_rows(prompt: Graph) -> tuple[Graph, dict[str, list[str]]] | None:
    """A graph that samples the rows of the grid, and the save nodes of each row; None if the workflow trains nothing.

    Args:
        prompt: the workflow that was run, in API format.
    """
    found = {node["class_type"]: name for name, node in prompt.items()}
    if not {"LoadSubjectImages", "DreamBoothLoRATrain", "ApplySubjectLoRA", "KSampler"} <= found.keys():
        return None
    subject = prompt[found["LoadSubjectImages"]]["inputs"]
    trained, sampler = prompt[found["DreamBoothLoRATrain"]]["inputs"], prompt[found["KSampler"]]
    if any(isinstance(subject[name], list) for name in ("token", "class_word")):
        return None
    graph = copy.deepcopy(_needed(prompt, found["ApplySubjectLoRA"]))
    word = subject["class_word"] or _word_of(subject["sample"])
    applied = {"model": [found["ApplySubjectLoRA"], 0], "clip": [found["ApplySubjectLoRA"], 1]}
    base = {"model": trained["model"], "clip": trained["clip"]}
    wanted = {
        f"“{word}” before": [(base, f"a photo of a {word} {scene}") for scene in SCENES],
        f"“{subject['token']} {word}” in new scenes": [
            (applied, f"a photo of {subject['token']} {word} {scene}") for scene in SCENES
        ],
        f"“{word}” after": [(applied, f"a photo of a {word} {scene}") for scene in SCENES],
    }
    size = _source(prompt, sampler["inputs"]["latent_image"])["inputs"]
    graph["grid.latent"] = {"class_type": "EmptyLatentImage", "inputs": {**size, "batch_size": 1}}
    rows: dict[str, list[str]] = {}
    for row, pictures in enumerate(wanted.values()):
        for column, (models, text) in enumerate(pictures):
            name = f"grid.{row}.{column}"
            graph |= _picture(name, sampler["inputs"], models, trained["vae"], text)
            rows.setdefault(list(wanted)[row], []).append(f"{name}.save")
    return graph, rows


def _word_of(sample: str) -> str:
    """The class word that the node takes for a sample if none is written."""
    about = json.loads((ROOT / "demo" / "subjects" / sample / "subject.json").read_text(encoding="utf-8"))
    return str(about["class_word"])


def _picture(name: str, sampler: dict[str, Any], models: dict[str, Any], vae: Any, text: str) -> Graph:
    def encode(words: str) -> dict[str, Any]:
        return {"class_type": "CLIPTextEncode", "inputs": {"clip": models["clip"], "text": words}}

    settings = {key: sampler[key] for key in ("steps", "cfg", "sampler_name", "scheduler", "denoise")}
    links = {
        "positive": [f"{name}.text", 0],
        "negative": [f"{name}.none", 0],
        "latent_image": ["grid.latent", 0],
    }
    sampled = {**settings, **links, "model": models["model"], "seed": SEED}
    return {
        f"{name}.text": encode(text),
        f"{name}.none": encode(""),
        f"{name}.sampler": {"class_type": "KSampler", "inputs": sampled},
        f"{name}.decode": {
            "class_type": "VAEDecode",
            "inputs": {"samples": [f"{name}.sampler", 0], "vae": vae},
        },
        f"{name}.save": {"class_type": "PreviewImage", "inputs": {"images": [f"{name}.decode", 0]}},
    }


def draw_grid(client: ComfyClient, graph: Graph, rows: dict[str, list[str]], photos: list[Image.Image]) -> Image.Image:
    """Run the graph and draw the rows with their labels below each other, the photos first."""
    prompt_id = client.queue(graph)
    _follow(client, prompt_id, {save for saves in rows.values() for save in saves})
    outputs = client.wait(prompt_id, timeout=3600)["outputs"]
    shown = {"photos": photos[: len(SCENES)]}
    for label, saves in rows.items():
        records = [outputs[save]["images"][0] for save in saves]
        shown[label] = [Image.open(io.BytesIO(client.view(**record))) for record in records]
    height = LABEL + SIDE + GAP
    sheet = Image.new("RGB", (len(SCENES) * (SIDE + GAP), len(shown) * height + LABEL), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (label, pictures) in enumerate(shown.items()):
        pen.text((4, row * height + 3), label, fill="black", font_size=13)
        for column, picture in enumerate(pictures):
            resized = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            sheet.paste(resized, (column * (SIDE + GAP), row * height + LABEL))
    for column, scene in enumerate(SCENES):
        pen.text((column * (SIDE + GAP) + 4, len(shown) * height + 2), scene, fill="black", font_size=12)
    return sheet


def _follow(client: ComfyClient, prompt_id: str, saves: set[str]) -> None:
    """Print the progress until all images are done, or none has arrived for five minutes."""
    started, left = time.monotonic(), set(saves)

    def is_news(event: Event) -> bool:
        drawn = event.type == "executed" and event.data.get("node") in left
        return event.prompt_id == prompt_id and (drawn or event.type in ENDS)

    while left:
        event = client.wait_event(is_news, timeout=300, missing_ok=True)
        if event is None or event.type in ENDS:
            return
        left.remove(event.data["node"])
        done = len(saves) - len(left)
        eta = (time.monotonic() - started) / done * len(left)
        print(f"  {done}/{len(saves)} images  ETA {eta:.0f} s", flush=True)


def _source(prompt: Graph, link: Any) -> dict[str, Any]:
    return prompt[link[0]]


def _needed(prompt: Graph, name: str) -> Graph:
    """The node and all nodes that it depends on."""

    def walk(at: str) -> Iterator[str]:
        yield at
        for value in prompt[at]["inputs"].values():
            if isinstance(value, list):
                yield from walk(value[0])

    return {at: prompt[at] for at in walk(name)}
