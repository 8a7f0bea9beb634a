"""Check the trainers connected to GenerateClassPriors before it makes its images.

ComfyUI runs GenerateClassPriors first, which may take minutes. A lazy input on the trainer would not help:
GenerateClassPriors is an output node itself, and ComfyUI (0.3.75 and 0.33) starts output nodes in the order of a Python
set. So the trainers' settings are read from the queued prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..trainer.preserve.ways import DEFAULT_WAY, check_way
from ..trainer.runs.publish import check_folder
from ..trainer.runs.recipe import Recipe
from ..trainer.subject.subject import Subject
from .base import base_of
from .host import loras_dirs, pack_output_dir
from .presets import CUSTOM, with_preset
from .settings import SETTINGS, config_from
from .usual import with_usual
from .wired.families import family_of

Prompt = Mapping[str, Mapping[str, Any]]


def check_trainers(
    prompt: Prompt | None, node_id: str | None, model: Any, clip: Any, vae: Any, subject: Subject, class_prompt: str
) -> None:
    """Check every trainer that uses the node's class images with the same model, CLIP, VAE and subject.

    Values that other nodes compute are not known yet; a trainer with such settings is checked only when it runs.

    Args:
        prompt: the queued prompt: node id -> class_type and inputs.
        node_id: the node that makes the class images.
        class_prompt: the prompt of the class images.

    Raises:
        SubjectBoothError: see :meth:`trainer.runs.run.Run.check`; or a setting is wrong, or the LoRA folder is not
            writable.
    """
    own = (prompt or {}).get(str(node_id))
    if prompt is None or own is None:  # inside a node that expands into others
        return
    shared = ("model", "clip", "vae", "subject")
    for inputs in _trainers(prompt, str(node_id)):
        if any(inputs.get(name) != own["inputs"].get(name) for name in shared):
            continue
        if isinstance(inputs.get("output_name"), str):
            check_folder(loras_dirs()[0], inputs["output_name"])
        way = inputs.get("preservation", DEFAULT_WAY)
        if isinstance(way, str):
            check_way(way)
        settings = _settings(prompt, inputs)
        if settings is None:
            continue
        settings = with_usual(settings, family_of(model))
        config = config_from(settings, settings.get("resolution") or subject.resolution)
        Recipe(base_of(model, clip, vae, config.train_text_encoder), subject, config).run(pack_output_dir()).check(
            class_prompt
        )


def _trainers(prompt: Prompt, node_id: str) -> Iterator[Mapping[str, Any]]:
    for node in prompt.values():
        inputs = node.get("inputs", {})
        if node.get("class_type") == "DreamBoothLoRATrain" and inputs.get("class_priors") == [node_id, 0]:
            yield inputs


def _settings(prompt: Prompt, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The trainer's settings, including those of its options node; None if another node computes one of them."""
    options: Mapping[str, Any] = {}
    link = inputs.get("options")
    if link is not None:
        source = prompt.get(str(link[0]), {}) if isinstance(link, list) and link else {}
        if source.get("class_type") != "DreamBoothOptions":
            return None
        options = source.get("inputs", {})
    preset = inputs.get("preset", CUSTOM)
    if not isinstance(preset, str):
        return None
    found = {name: value for name, value in with_preset({**inputs, **options}, preset).items() if name in SETTINGS}
    return None if any(isinstance(value, list) for value in found.values()) else found
