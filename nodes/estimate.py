"""What a training will take, before Run: the route behind the line on DreamBoothLoRATrain.

POST /estimate    {"prompt": {...}, "node": "11"}: a prompt in API format, at least the trainer and what it hangs on
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
from aiohttp import web

from ..trainer.files.kept_reads import KeptReads
from ..trainer.preserve.ways import DEFAULT_WAY, check_way
from ..trainer.runs.estimate import Estimate, estimate, latest_runs
from .base_graph import FILE as BASE_FILE
from .base_graph import base_graph, base_label, is_link, read_base_graph
from .host import pack_output_dir
from .presets import CUSTOM, with_preset
from .routes import RouteError, json_body, serve
from .settings import SETTINGS, config_from
from .usual import with_usual, without_usual
from .wired.families import family_named

DEFAULT_RESOLUTION = 512


def register() -> None:
    """Register the route; called once, when the pack is loaded."""
    serve("/estimate", POST=_estimate)


async def _estimate(request: web.Request) -> dict[str, Any]:
    body = await json_body(request)
    prompt, node_id = body.get("prompt"), body.get("node")
    if not (isinstance(prompt, dict) and isinstance(node_id, str) and all(map(_is_node, prompt.values()))):
        raise RouteError(400, "prompt is not a prompt in API format, or node is not a node id")
    if node_id not in prompt:
        raise RouteError(400, "the prompt has no such node")
    return await asyncio.to_thread(_describe, prompt, node_id)


def _is_node(value: Any) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("class_type"), str) and isinstance(value.get("inputs"), dict)
    )


def _describe(prompt: Mapping[str, Any], node_id: str) -> dict[str, Any]:
    """The estimate as plain JSON values; ``known`` is false without a run to compare with.

    Raises:
        SubjectBoothError: the node would reject the settings.
    """
    inputs = prompt[node_id]["inputs"]
    subject = _linked(prompt, inputs.get("subject"))
    resolution = _number(inputs.get("resolution")) or _number(subject.get("resolution")) or DEFAULT_RESOLUTION
    base = base_graph(prompt, node_id)
    wanted = None if base is None else base_label(base)
    runs = [] if wanted is None else [run for run in latest_runs(pack_output_dir()) if _base_of(run)[0] == wanted]
    families = [family for _, family in map(_base_of, runs) if family]
    config = config_from(_settings(prompt, inputs, families[0] if families else ""), resolution)
    way = inputs.get("preservation", DEFAULT_WAY)
    way = DEFAULT_WAY if is_link(way) else way
    check_way(way)
    found = estimate(runs, config, way, _free())
    return {"known": False} if found is None else _as_json(found)


def _settings(prompt: Mapping[str, Any], inputs: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The settings that the trainer would use, without those that other nodes compute.

    Args:
        family: the name of the base's family; empty if it is not known.
    """
    preset = inputs.get("preset", CUSTOM)
    given = with_preset({**inputs, **_linked(prompt, inputs.get("options"))}, CUSTOM if is_link(preset) else preset)
    own = {name: value for name, value in given.items() if name in SETTINGS and not is_link(value)}
    return with_usual({"rank": 0, **own}, family_named(family)) if family else without_usual(own)


def _read_base(path: Path) -> tuple[str | None, str]:
    """What identifies the base of a run, and the name of its family; None and empty if they are not known."""
    graph = read_base_graph(path.parent)
    return (None, "") if graph is None else (base_label(graph), str(graph.get("family", "")))


_bases = KeptReads(_read_base)


def _base_of(run: Path) -> tuple[str | None, str]:
    return _bases(run / BASE_FILE)


def _as_json(found: Estimate) -> dict[str, Any]:
    plan = found.plan
    memory = (
        {}
        if plan is None
        else {
            "needed": plan.needed,
            "free": plan.free,
            "fits": plan.fits,
            "offloads": plan.offloads,
            "checkpointing": plan.chosen.gradient_checkpointing,
            "warning": plan.warning,
        }
    )
    return {
        "known": True,
        "seconds": found.seconds,
        "step": found.step,
        "trigger": found.trigger,
        "run": found.folder.name,
        "scaled": found.is_scaled,
        **memory,
    }


def _linked(prompt: Mapping[str, Any], link: Any) -> Mapping[str, Any]:
    """The inputs of a linked node; empty if there is none."""
    return dict(prompt[link[0]]["inputs"]) if is_link(link) and link[0] in prompt else {}


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _free() -> int:
    """Bytes that training could use: what is free, and what ComfyUI's models hold, as they are unloaded for it."""
    device = comfy.model_management.get_torch_device()
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models if entry.device == device]
    held = sum(model.loaded_size() for model in loaded if model is not None)
    return int(comfy.model_management.get_free_memory(device) + held)
