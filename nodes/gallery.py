"""The runs of this machine for the gallery: what it lists, and what can be done with a run's steps."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from ..trainer.errors import SubjectBoothError
from ..trainer.files.safetensors_file import checksum_matches, read_metadata
from ..trainer.files.storage import canonical_json, disk_errors, read_json_object, write_atomic
from ..trainer.runs.folder import lora_path
from ..trainer.runs.gallery import RunSummary, list_runs
from ..trainer.runs.publish import publish
from .base_graph import base_file, is_link, read_base_graph
from .host import loras_dirs, pack_output_dir, versioned_entry
from .live import active

THUMBNAIL_SIDE = 256
SWEEP = "sweep"
"""Folder in a run's folder with the pictures of :func:`sweep_graph`."""
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
MOST_PROMPTS = 3
"""Rows of a sweep: each takes as many pictures as there are strengths."""
SAMPLING_STEPS = 20
FIRST_NODE = 9_000_001
"""Node ids of a sweep, which must differ from those of the graph in the editor: results are matched by them."""

_SWEPT = re.compile(r"(\d{6,9})_(\d{2})_(\d\.\d{2})_(\d{5,})_\.png")


def describe_runs() -> dict[str, Any]:
    """All runs, the latest first, as plain JSON values; see :class:`trainer.runs.gallery.RunSummary`."""
    runs = list_runs(pack_output_dir())
    return {"runs": [_describe(run) for run in runs], "size": sum(run.size for run in runs)}


def _describe(run: RunSummary) -> dict[str, Any]:
    graph = read_base_graph(run.folder)
    lora = run.published.get("lora")
    return {
        "run": run.folder.name,
        "trigger": run.trigger,
        "step": run.step,
        "steps": run.steps,
        "why": run.why,
        "base": run.base,
        "file": base_file(graph) if graph else "",
        "size": run.size,
        "started": run.started,
        "changed": run.changed,
        "resolution": run.resolution,
        "rank": run.rank,
        "learning_rate": run.learning_rate,
        "preservation": run.preservation,
        "saved": len(run.saved),
        "pictures": run.pictures,
        "thumbnail": versioned_entry(run.thumbnail)["v"] if run.thumbnail else "",
        "lora": lora if isinstance(lora, str) else "",
        "active": active(run.folder.name) is not None,
    }


def thumbnail(path: Path) -> bytes:
    """A small JPEG of a validation image.

    Raises:
        OSError: the image is missing or damaged.
    """
    file = io.BytesIO()
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            small = picture.convert("RGB")
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


def file_of_step(run: RunSummary, step: int) -> str:
    """The LoRA file of a step, as ComfyUI's lists name it. It is published if it is not there yet.

    A step other than the published one gets a file of its own (``rex_step_200.safetensors``), so that the file which
    the trainer's node publishes stays as it is.

    Args:
        run: the run.
        step: one of ``run.saved``.

    Raises:
        SubjectBoothError: the adapter is missing or damaged, or the LoRA folder cannot be written.
    """
    folder = loras_dirs()[0]
    source = lora_path(run.folder, step)
    metadata = _checked_metadata(source, step)
    name = run.published.get("lora")
    if isinstance(name, str) and _is_file_of(folder / name, folder, metadata):
        return name.replace("/", os.sep)
    stem = name.removesuffix(".safetensors") if isinstance(name, str) else run.folder.name[:-13]
    target = publish(source, folder, f"{stem}_step_{step}").path
    return str(target.relative_to(folder))


def _checked_metadata(source: Path, step: int) -> dict[str, str]:
    damaged = SubjectBoothError(
        f"the LoRA of step {step} is missing or damaged", "a step whose LoRA was kept", "choose another step", "step"
    )
    try:
        if source.is_symlink() or not checksum_matches(source.read_bytes()):
            raise damaged
        return read_metadata(source)
    except SubjectBoothError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise damaged from error


def _is_file_of(path: Path, folder: Path, metadata: dict[str, str]) -> bool:
    """Whether a file in the LoRA folder is that of the same run and step."""
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return False
        found = read_metadata(path)
    except (SubjectBoothError, OSError, ValueError):
        return False
    names = ("subjectbooth.run_key", "subjectbooth.step")
    return all(found.get(name) == metadata.get(name) for name in names)


def sweep_graph(run: RunSummary, step: int, base: dict[str, Any], prompts: list[str]) -> dict[str, Any]:
    """A prompt in API format that draws each prompt at each of :data:`STRENGTHS`, from one seed per prompt.

    Args:
        run: the run.
        step: one of ``run.saved``.
        base: see :func:`nodes.base_graph.base_graph`, with ``cfg``.
        prompts: with ``{subject}``.

    Raises:
        SubjectBoothError: see :func:`file_of_step`.
    """
    name = file_of_step(run, step)
    with disk_errors("the strength sweep cannot be prepared", run.folder):
        about = {**sweep_prompts(run.folder), str(step): prompts}
        write_atomic(run.folder / SWEEP / "prompts.json", canonical_json(about))
    ids = {old: str(FIRST_NODE + number) for number, old in enumerate(base["nodes"])}

    def moved(value: Any) -> Any:
        return [ids[value[0]], value[1]] if is_link(value) and value[0] in ids else value

    graph = {
        ids[old]: {
            "class_type": node["class_type"],
            "inputs": {name: moved(value) for name, value in node["inputs"].items()},
        }
        for old, node in base["nodes"].items()
    }
    model, clip, vae = (moved(base[name]) for name in ("model", "clip", "vae"))

    def add(class_type: str, **inputs: Any) -> str:
        node_id = str(FIRST_NODE + len(graph))
        graph[node_id] = {"class_type": class_type, "inputs": inputs}
        return node_id

    side = run.resolution or 512
    negative = add("CLIPTextEncode", clip=clip, text="")
    latent = add("EmptyLatentImage", width=side, height=side, batch_size=1)
    for row, prompt in enumerate(prompts):
        for strength in STRENGTHS:
            both = {"strength_model": strength, "strength_clip": strength}
            apply = add("ApplySubjectLoRA", model=model, clip=clip, lora_name=name, prompt=prompt, **both)
            positive = add("CLIPTextEncode", clip=[apply, 1], text=[apply, 2])
            samples = add(
                "KSampler",
                model=[apply, 0],
                positive=[positive, 0],
                negative=[negative, 0],
                latent_image=[latent, 0],
                seed=row,
                steps=SAMPLING_STEPS,
                cfg=base.get("cfg", 7.0),
                sampler_name="euler",
                scheduler="normal",
                denoise=1.0,
            )
            image = add("VAEDecode", samples=[samples, 0], vae=vae)
            prefix = f"{pack_output_dir().name}/{run.folder.name}/{SWEEP}/{step:06d}_{row:02d}_{strength:.2f}"
            add("SaveImage", images=[image, 0], filename_prefix=prefix)
    return graph


def swept(folder: Path) -> list[dict[str, Any]]:
    """The sweeps of a run: step, prompts, strengths, and the newest picture of each row and strength (or None)."""
    newest: dict[tuple[int, int, str], tuple[int, Path]] = {}
    place = folder / SWEEP
    entries = sorted(place.iterdir()) if place.is_dir() and not place.is_symlink() else []
    for path in entries:
        if (found := _SWEPT.fullmatch(path.name)) and not path.is_symlink():
            key = int(found[1]), int(found[2]), found[3]
            newest[key] = max(newest.get(key, (0, path)), (int(found[4]), path))
    prompts = sweep_prompts(folder)
    steps = sorted({step for step, _, _ in newest} | {int(step) for step in prompts})
    return [
        {
            "step": step,
            "prompts": prompts.get(str(step), []),
            "strengths": list(STRENGTHS),
            "images": [
                [
                    versioned_entry(newest[step, row, f"{strength:.2f}"][1])
                    if (step, row, f"{strength:.2f}") in newest
                    else None
                    for strength in STRENGTHS
                ]
                for row in range(len(prompts.get(str(step), [])))
            ],
        }
        for step in steps
    ]


def sweep_prompts(folder: Path) -> dict[str, list[str]]:
    """The prompts of the sweeps of a run, by step."""
    path = folder / SWEEP / "prompts.json"
    values = {} if path.is_symlink() else read_json_object(path)
    return {
        step: [str(prompt) for prompt in prompts][:MOST_PROMPTS]
        for step, prompts in values.items()
        if isinstance(prompts, list) and step.isascii() and step.isdigit() and len(step) < 10
    }


def prompts_of(folder: Path) -> list[str]:
    """The first validation prompts of a run, or one of the subject alone."""
    try:
        config = read_json_object(folder / "run.json")["config"]
        found = [str(prompt) for prompt in config["validation_prompts"] if str(prompt).strip()]
    except (KeyError, TypeError):
        found = []
    return found[:MOST_PROMPTS] or ["a photo of {subject}"]


def file_manager() -> list[str] | None:
    """The command that opens a folder on this machine; None if there is no desktop."""
    if sys.platform == "win32":
        return ["explorer"]
    if sys.platform == "darwin":
        return ["open"]
    has_desktop = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    command = shutil.which("xdg-open") if has_desktop else None
    return [command] if command else None


def open_folder(folder: Path) -> bool:
    """Show a folder in the file manager of this machine; whether there is one."""
    command = file_manager()
    if command is None:
        return False
    try:
        subprocess.Popen(
            [*command, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        return False
    return True
