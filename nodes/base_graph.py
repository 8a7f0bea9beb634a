"""The nodes that make the base of a run, kept in its folder, so that its LoRA can be drawn without the user's graph."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..trainer.files.storage import write_atomic

FILE = "base.json"
INPUTS = ("model", "clip", "vae")
MOST_BYTES = 48 * 1024
"""Size of a description: loaders and what patches their models are a few hundred bytes."""
OWN_NODES = frozenset(("DreamBoothLoRATrain", "GenerateClassPriors", "EvaluateSubjectLoRA", "LoadSubjectImages"))
"""A base that depends on one of these is not kept: drawing with it would train, or draw class images."""
WEIGHTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".gguf")

logger = logging.getLogger("subjectbooth")

Prompt = Mapping[str, Mapping[str, Any]]


def base_graph(prompt: Prompt | None, node_id: str | None) -> dict[str, Any] | None:
    """What makes the MODEL, CLIP and VAE of a node: ``nodes`` in API format, and a link for each input.

    Args:
        prompt: the whole prompt in API format.
        node_id: the node whose inputs are meant.

    Returns:
        None if it cannot be told, is large, or depends on a training.
    """
    inputs = ((prompt or {}).get(str(node_id)) or {}).get("inputs") or {}
    links = {name: inputs.get(name) for name in INPUTS}
    nodes: dict[str, Any] = {}
    waiting = _sources(links.values())[::-1]  # the model's own nodes first, see base_file
    while waiting:
        name = waiting.pop()
        node = (prompt or {}).get(name)
        if node is None or node.get("class_type") in OWN_NODES:
            return None
        if name in nodes:
            continue
        nodes[name] = {"class_type": node["class_type"], "inputs": dict(node.get("inputs", {}))}
        waiting += _sources(nodes[name]["inputs"].values())[::-1]
    found = {"nodes": nodes, **links}
    return found if is_base_graph(found) else None


def is_base_graph(value: Any) -> bool:
    """Whether a JSON value has the form of :func:`base_graph`'s result; it may come from a client."""
    if not isinstance(value, dict) or not isinstance(value.get("nodes"), dict):
        return False
    nodes = value["nodes"]
    links: list[Any] = [value.get(name) for name in INPUTS]
    for node in nodes.values():
        if not (isinstance(node, dict) and isinstance(node.get("class_type"), str)):
            return False
        if not isinstance(node.get("inputs"), dict):
            return False
        links += [given for given in node["inputs"].values() if is_link(given)]
    if len(_sources(links)) < len(links) or not nodes.keys() >= set(_sources(links)):
        return False
    try:
        return len(json.dumps(value)) <= MOST_BYTES
    except (TypeError, ValueError, RecursionError):
        return False


def is_link(value: Any) -> bool:
    """Whether an input's value is ``[node id, output index]``."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int


def _sources(values: Iterable[Any]) -> list[str]:
    """The node ids of those values that are links."""
    return [value[0] for value in values if is_link(value)]


def model_files(prompt: Prompt | None, node_id: str | None) -> list[str]:
    """Names of the files of weights from which a node's MODEL is made, of LoRAs on it as well, the nearest first.

    Args:
        prompt, node_id: see :func:`base_graph`.
    """
    nodes = prompt or {}
    waiting = _sources([((nodes.get(str(node_id)) or {}).get("inputs") or {}).get("model")])
    seen: set[str] = set()
    found: list[str] = []
    while waiting:
        name = waiting.pop(0)
        if name in seen or name not in nodes:
            continue
        seen.add(name)
        values = nodes[name].get("inputs", {}).values()
        found += _files(values)
        waiting += _sources(values)
    return found


def _files(values: Iterable[Any]) -> list[str]:
    """Those values that are names of files of weights."""
    return [value for value in values if isinstance(value, str) and value.lower().endswith(WEIGHTS)]


def base_file(graph: Mapping[str, Any]) -> str:
    """The name of the first file of weights that the nodes load; empty without one."""
    names = (name for node in graph["nodes"].values() for name in _files(node["inputs"].values()))
    return next(names, "").replace("\\", "/").rsplit("/", 1)[-1]


def base_label(graph: Mapping[str, Any]) -> str:
    """What identifies a base among the runs of this machine: its file, or without one the nodes that load it."""
    kinds = {node["class_type"] for node in graph["nodes"].values() if not _sources(node["inputs"].values())}
    return base_file(graph) or ", ".join(sorted(kinds))


def keep_base_graph(folder: Path, prompt: Prompt | None, node_id: str | None, cfg: float, family: str) -> None:
    """Write :data:`FILE` to a run's folder, unless it has the same content.

    Args:
        folder: the run's folder.
        prompt, node_id: see :func:`base_graph`.
        cfg: the guidance scale that is usual for the base.
        family: the name of the base's family, see :func:`nodes.wired.families.family_of`.
    """
    graph = base_graph(prompt, node_id)
    if graph is None:
        return
    kept = {**graph, "cfg": cfg, "family": family}
    if read_base_graph(folder) != kept:
        try:
            write_atomic(folder / FILE, json.dumps(kept, indent=1, ensure_ascii=False))
        except OSError as error:  # the training is over and its LoRA is published
            logger.warning("%s cannot be saved: %s", folder / FILE, error)


def read_base_graph(folder: Path) -> dict[str, Any] | None:
    """What :func:`keep_base_graph` wrote; None if there is nothing, or it is damaged."""
    path = folder / FILE
    try:
        if path.is_symlink() or path.stat().st_size > 2 * MOST_BYTES:
            return None
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if is_base_graph(values) else None
