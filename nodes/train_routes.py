"""Routes for the panel on DreamBoothLoRATrain: a run's loss curves and images, and stopping it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import web

from ..trainer.runs.history import read_history
from .host import pack_output_dir, versioned_entry
from .live import active, all_active, ended
from .routes import RouteError, named_path, query_int, serve


def register() -> None:
    """Register the routes; called once, when the pack is loaded."""
    serve("/active", GET=_active)
    serve("/runs/{name}/events", GET=_events)
    serve("/runs/{name}/stop", POST=_stop)


async def _active(_request: web.Request) -> dict[str, Any]:
    """The runs in training."""
    return {"runs": [feed.state() for feed in all_active()]}


async def _events(request: web.Request) -> dict[str, Any]:
    """A run's history since a step, its current state if it is in training, and how its last training ended."""
    folder, since = run_folder(request), query_int(request, "since")
    # Read before the log, so that no step is missed in between; the panel ignores duplicate points.
    feed, end = active(folder.name), ended(folder.name)
    history = await asyncio.to_thread(_history, folder, since)
    return {"run": folder.name, **history, "active": feed.state() if feed else None, "ended": end}


def _history(folder: Path, since: int) -> dict[str, Any]:
    history = read_history(folder, since)
    shown = []
    for validation in history["validations"]:
        paths = [folder / picture for picture in validation.pop("pictures")]
        if paths and all(path.is_file() for path in paths):
            shown.append({**validation, "images": [versioned_entry(path) for path in paths]})
    return {**history, "validations": shown}


async def _stop(request: web.Request) -> dict[str, Any]:
    """Stop a run after its next step and keep what it has learned as its result."""
    folder = run_folder(request)
    feed = active(folder.name)
    if feed is None:
        raise RouteError(409, "this run is not in training")
    feed.stop_and_keep()
    return feed.state()


def run_folder(request: web.Request) -> Path:
    """The folder of the run named in the URL.

    Raises:
        RouteError: 400 if the name is invalid, 404 if there is no such run.
    """
    name = request.match_info["name"]
    root = pack_output_dir()
    folder = named_path(root, name)
    # Links to other runs are rejected too: a run is identified by the name of its own folder.
    is_run = folder.parent == root.resolve() and folder.name == name and _is_file(folder, "run.json")
    if not is_run and active(name) is None and ended(name) is None:
        raise RouteError(404, "run not found")
    for file in ("events.jsonl", "kept.json", "result.json", "validation"):
        named_path(folder, file)
    return root / name


def _is_file(folder: Path, name: str) -> bool:
    return folder.is_dir() and named_path(folder, name).is_file()
