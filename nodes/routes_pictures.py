"""Routes behind the panels of LoadSubjectImages, GenerateClassPriors and ApplySubjectLoRA."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aiohttp import web
from PIL import Image

from ..trainer.errors import SubjectBoothError
from ..trainer.files.safetensors_file import read_metadata
from .host import pack_output_dir
from .lora_choice import lora_path
from .photo_preview import data_address, describe_photos
from .routes import RouteError, json_body, named_path, serve

MOST_PICTURES = 500
"""Maximum number of class images in a panel."""
CLASS_IMAGE = re.compile(r"([0-9a-f]{32})_[0-9a-f]{8}\.png")
PREVIEW_SUFFIXES = (".preview.png", ".preview.jpg", ".png", ".jpg", ".jpeg", ".webp")
"""Suffixes of preview images that LoRA managers store next to a file."""

# One at a time: decoding photos must not compete with a running training for the CPU.
_worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="subjectbooth-pictures")


def register() -> None:
    """Register the routes; called once, before ComfyUI's server starts to listen."""
    serve("/photos", POST=photos)
    serve("/lora", GET=lora)
    serve("/class_images", GET=class_images)


async def photos(request: web.Request) -> Any:
    """The photos of the given widget values, as training sees them."""
    widgets = await json_body(request)
    return await _in_worker(lambda: describe_photos(widgets))


async def lora(request: web.Request) -> Any:
    """The metadata of a file in models/loras."""
    name = request.query.get("name", "")
    return await _in_worker(lambda: describe_lora(name))


async def class_images(request: web.Request) -> Any:
    """The class images in one of the pack's folders, oldest first."""
    folder = named_path(pack_output_dir() / "class_images", request.query.get("folder", ""))
    return await _in_worker(lambda: list_class_images(folder))


async def _in_worker(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return await asyncio.get_running_loop().run_in_executor(_worker, work)


def describe_lora(name: str) -> dict[str, Any]:
    """Trigger words, settings and a thumbnail of a LoRA file; ``trigger`` is empty if its metadata contain none.

    Raises:
        RouteError: 404, the file was not found.
        SubjectBoothError: it is not a safetensors file.
    """
    try:
        path = lora_path(name)
    except SubjectBoothError as error:
        raise RouteError(404, str(error)) from error
    metadata = read_metadata(path)
    picture = _validation_picture(metadata) or _preview_image(path)
    return {
        "name": name,
        "trigger": metadata.get("subjectbooth.trigger") or metadata.get("modelspec.trigger_phrase", ""),
        "prompt": metadata.get("subjectbooth.instance_prompt", ""),
        "ours": "subjectbooth.run_key" in metadata,
        "step": metadata.get("subjectbooth.step") or metadata.get("ss_steps", ""),
        "rank": metadata.get("ss_network_dim", ""),
        "base": metadata.get("ss_base_model_version", ""),
        "megabytes": round(path.stat().st_size / 2**20, 1),
        "thumbnail": _thumbnail(picture) if picture is not None else "",
    }


def _validation_picture(metadata: dict[str, str]) -> Path | None:
    """The validation image of this adapter, or of the latest one before it, from the folder of its run."""
    key, step = metadata.get("subjectbooth.run_key", ""), metadata.get("subjectbooth.step", "")
    if not re.fullmatch("[0-9a-f]{64}", key) or not re.fullmatch("[0-9]{1,9}", step):
        return None
    found = sorted(pack_output_dir().glob(f"*_{key[:12]}/validation/step_*_00.png"))
    up_to = [path for path in found if path.name <= f"step_{int(step):06d}_00.png"]
    root = pack_output_dir()
    for path in reversed(up_to):
        try:
            return named_path(root, path.relative_to(root).as_posix(), folders=True)
        except RouteError:  # a link that leads elsewhere is not one of our images
            continue
    return None


def _preview_image(path: Path) -> Path | None:
    return next((found for end in PREVIEW_SUFFIXES if (found := path.with_suffix(end)).is_file()), None)


def _thumbnail(path: Path) -> str:
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
            return data_address(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""


def list_class_images(folder: Path) -> dict[str, Any]:
    """Content hashes of the images in a folder of class images, and their names for ComfyUI's /view."""
    try:
        files = [(path.stat().st_mtime_ns, path) for path in folder.iterdir() if CLASS_IMAGE.fullmatch(path.name)]
    except OSError as error:
        raise RouteError(404, "class images not found") from error
    by_hash = {path.name[:32]: path for _, path in sorted(files)}  # the newest, if several VAEs decoded it
    shown = list(by_hash.items())[:MOST_PICTURES]
    subfolder = f"{pack_output_dir().name}/{folder.parent.name}/{folder.name}"
    pictures = [
        {"hash": digest, "filename": path.name, "subfolder": subfolder, "type": "output"} for digest, path in shown
    ]
    return {"folder": folder.name, "prompt": _prompt(folder), "count": len(by_hash), "pictures": pictures}


def _prompt(folder: Path) -> str:
    try:
        return str(json.loads(named_path(folder, "recipe.json").read_text("utf-8"))["prompt"])
    except (RouteError, OSError, ValueError, KeyError, TypeError):
        return ""
