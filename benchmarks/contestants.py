"""Who is compared, and how each is started on the same scene."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .recorder import steps_of
from .scene import CLASS, LEARNING_RATE, TRIGGER, Scene

CHILD = Path(__file__).with_name("child.py")
ROOT = CHILD.parent.parent


class ContestantFailed(Exception):
    """A contestant's process ended with an error; the message has the end of its output."""


@dataclass(frozen=True)
class Places:
    """What some contestants need.

    Attributes:
        script: diffusers' ``train_dreambooth_lora.py``; None without it.
        comfyui: ComfyUI's folder; None without it.
        scratch: for outputs.
    """

    script: Path | None
    comfyui: Path | None
    scratch: Path


Run = Callable[[Scene, Places, Path, bool], dict[str, Any]]
"""(scene, places, output folder, whether a step is counted) -> what the recorder found, and the whole job's seconds."""


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Attributes:
        name: short, for options and JSON.
        title: for readers.
        run: trains once.
        floor: the name of the contestant that its ratios refer to.
        note: how it differs from the others; empty for not at all.
        needs: ``script`` or ``comfyui`` of :class:`Places`, or empty.
    """

    name: str
    title: str
    run: Run
    floor: str = "floor"
    note: str = ""
    needs: str = ""

    def is_possible(self, places: Places) -> bool:
        return not self.needs or getattr(places, self.needs) is not None


def run_child(
    name: str, scene: Scene, places: Places, output: Path, counts: bool, arguments: list[str]
) -> dict[str, Any]:
    """Run ``child.py``; see :data:`Run`.

    Raises:
        ContestantFailed: it ended with an error.
    """
    out = output.with_suffix(".json")
    out.unlink(missing_ok=True)
    log = output.with_suffix(".log")
    started = time.monotonic()
    command = [sys.executable, str(CHILD), name, scene.to_json(), str(out)]
    command += ["counts" if counts else "times", str(started), str(output), *arguments]
    with log.open("wb") as file:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment(scene), check=False
        )
    whole = time.monotonic() - started
    if done.returncode or not out.is_file():
        raise ContestantFailed(f"{name} failed:\n{log.read_text('utf-8', 'replace')[-4000:]}")
    return {**json.loads(out.read_text("utf-8")), "whole": whole}


def environment(scene: Scene) -> dict[str, str]:
    """The same for all: offline, and on a CPU with threads that sleep when they wait, as ComfyUI's are started here."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    env["SUBJECTBOOTH_CACHE"] = str(scene.folder / "digests")  # the counted run is the first one on the base
    if scene.device == "cpu":
        env |= {"OMP_WAIT_POLICY": "PASSIVE", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    if scene.threads:
        env["OMP_NUM_THREADS"] = str(scene.threads)
    return env


def floor(has_class: bool) -> Run:
    def run(scene: Scene, places: Places, output: Path, counts: bool) -> dict[str, Any]:
        return run_child("floor-class" if has_class else "floor", scene, places, output, counts, [])

    return run


def ours(way: str, prepare: bool = False) -> Run:
    """This project from the shell.

    Args:
        way: of keeping the class.
        prepare: fill the store of class images with random latents, in place of drawing them.
    """

    def run(scene: Scene, places: Places, output: Path, counts: bool) -> dict[str, Any]:
        has_class = way == "class_images"
        arguments = {
            "--base": scene.base,
            "--photos": scene.photo_folder,
            "--class-word": CLASS,
            "--output_dir": places.scratch / f"ours-{way}-{scene.size}-{scene.resolution}",
            "--steps": steps_of(scene, counts),
            "--learning_rate": LEARNING_RATE,
            "--resolution": scene.resolution,
            "--rank": scene.rank,
            "--network_alpha": scene.rank,
            "--train_batch_size": scene.batch,
            "--precision": scene.precision,
            "--gradient_checkpointing": "off",
            "--preservation": way,
            "--num_class_images": scene.class_images if has_class else 0,
            "--class_guidance_scale": 1,
        }
        given = [str(part) for pair in arguments.items() for part in pair]
        flags = ["--force_retrain", *(["--cpu"] if scene.device == "cpu" else [])]
        return run_child("ours-prepare" if prepare else "ours", scene, places, output, counts, [*given, *flags])

    return run


def script(has_class: bool, *flags: str) -> Run:
    def run(scene: Scene, places: Places, output: Path, counts: bool) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "--pretrained_model_name_or_path": scene.base,
            "--instance_data_dir": scene.photo_folder,
            "--instance_prompt": f"a photo of {TRIGGER}",
            "--output_dir": output,
            "--max_train_steps": steps_of(scene, counts),
            "--resolution": scene.resolution,
            "--rank": scene.rank,
            "--train_batch_size": scene.batch,
            "--learning_rate": LEARNING_RATE,
            "--lr_scheduler": "constant",
            "--lr_warmup_steps": 0,
            "--mixed_precision": "no" if scene.precision == "fp32" else scene.precision,
            "--checkpointing_steps": 10**6,
            "--seed": 0,
        }
        switches = ["--pre_compute_text_embeddings", *flags]
        if has_class:
            arguments |= {
                "--class_data_dir": scene.class_folder,
                "--class_prompt": f"a photo of a {CLASS}",
                "--num_class_images": scene.class_images,
            }
            switches.append("--with_prior_preservation")
        given = [str(part) for pair in arguments.items() for part in pair]
        return run_child("diffusers", scene, places, output, counts, [str(places.script), *given, *switches])

    return run


_SCRIPT_NOTE = "encodes each photo with the VAE at every step; in bf16 its adapter is bf16 too"


def all_contestants(places: Places) -> list[Contestant]:
    """All of them, whether possible here or not."""
    from .comfyui import core, wired

    found = [
        Contestant("floor", "bare peft loop", floor(False), note="reads nothing back, reports nothing, one prompt"),
        Contestant("ours", "SubjectBooth, shell", ours("none")),
        Contestant("ours-curvature", "SubjectBooth, shell, curvature", ours("curvature"), note=_CURVATURE_NOTE),
        Contestant("wired", "SubjectBooth, ComfyUI", wired(False), needs="comfyui"),
        Contestant("diffusers", "diffusers' script", script(False), needs="script", note=_SCRIPT_NOTE),
        Contestant("core", "ComfyUI's Train LoRA", core(), needs="comfyui", note=_CORE_NOTE),
        Contestant("floor-class", "bare peft loop, class", floor(True), floor="floor-class"),
        Contestant("ours-class", "SubjectBooth, shell, class", ours("class_images"), floor="floor-class"),
        Contestant("wired-class", "SubjectBooth, ComfyUI, class", wired(True), "floor-class", needs="comfyui"),
        Contestant("diffusers-class", "diffusers' script, class", script(True), "floor-class", _SCRIPT_NOTE, "script"),
    ]
    if places.script and "--cache_latents" in places.script.read_text("utf-8"):
        plain = next(each for each in found if each.name == "diffusers")
        found.append(
            replace(
                plain,
                name="diffusers-cached",
                title="diffusers' script, latents cached",
                run=script(False, "--cache_latents"),
                note="",
            )
        )
    return found


_CURVATURE_NOTE = "keeps the class without class images; the base is studied before the first step"
_CORE_NOTE = (
    "adapters on every weight of the UNet, not only attention's: LoRA on all matrices and convolutions, a trained "
    "difference on all norms and biases; alpha 1; no clipping of gradients; no class images"
)
