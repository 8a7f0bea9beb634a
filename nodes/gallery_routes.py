"""Routes of the gallery: the runs of this machine, and what can be done with one.

GET    /gallery                     all runs
GET    /runs/{name}/thumbnail       a small JPEG of its result
GET    /runs/{name}/sweep           its strength sweeps
POST   /runs/{name}/sweep           {"step": 200} -> a prompt for POST /prompt that draws one
POST   /runs/{name}/publish         {"step": 200} -> the LoRA file of a step
POST   /runs/{name}/open            open its folder on the server
DELETE /runs/{name}                 delete it
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from aiohttp import web

from ..trainer.runs.gallery import RunSummary, delete_run, summarise
from . import gallery
from .base_graph import is_base_graph, read_base_graph
from .host import pack_output_dir
from .live import active
from .routes import RouteError, json_body, named_path, serve
from .train_routes import run_folder

# One at a time: pictures are decoded and LoRAs copied without competing with a running training for the CPU.
_worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="subjectbooth-gallery")

T = TypeVar("T")


def register() -> None:
    """Register the routes; called once, when the pack is loaded."""
    serve("/gallery", GET=_gallery)
    serve("/runs/{name}", DELETE=_delete)
    serve("/runs/{name}/thumbnail", GET=_thumbnail)
    serve("/runs/{name}/sweep", GET=_sweeps, POST=_sweep)
    serve("/runs/{name}/publish", POST=_publish)
    serve("/runs/{name}/open", POST=_open)


async def _gallery(request: web.Request) -> dict[str, Any]:
    """All runs. ``opens``: whether this client can have a folder opened; ``folder``: where the runs are."""
    root = pack_output_dir()
    local = _is_local(request)
    return {
        **await _in_worker(gallery.describe_runs),
        "opens": local and gallery.file_manager() is not None,
        # The full path is shown on this machine only.
        "folder": str(root) if local else f"output/{root.name}",
    }


async def _thumbnail(request: web.Request) -> web.Response:
    run = await _run(request)
    if run.thumbnail is None:
        raise RouteError(404, "this run has no pictures")
    path = named_path(run.folder, run.thumbnail.relative_to(run.folder).as_posix(), folders=True)
    try:
        content = await _in_worker(lambda: gallery.thumbnail(path))
    except OSError:
        raise RouteError(404, "this run has no pictures") from None
    # Its address changes with the picture.
    headers = {"Cache-Control": "private, max-age=86400" if request.query.get("v") else "no-store"}
    return web.Response(body=content, content_type="image/jpeg", headers=headers)


async def _publish(request: web.Request) -> dict[str, Any]:
    run, step, _ = await _run_and_step(request)
    return {"lora": await _in_worker(lambda: gallery.file_of_step(run, step)), "step": step}


async def _sweep(request: web.Request) -> dict[str, Any]:
    """The prompt of a strength sweep. ``base`` in the body stands in for a run that has not kept its own."""
    run, step, body = await _run_and_step(request)
    base = read_base_graph(run.folder) or body.get("base")
    if not isinstance(base, dict) or not is_base_graph(base):
        raise RouteError(
            409,
            "this run was trained by a version that did not keep what loads its model: open a workflow that loads it, "
            "and try again",
        )
    cfg = base.get("cfg")
    base["cfg"] = cfg if isinstance(cfg, (int, float)) and not isinstance(cfg, bool) and 0 < cfg <= 100 else 7.0
    prompts = gallery.prompts_of(run.folder)
    return {"prompt": await _in_worker(lambda: gallery.sweep_graph(run, step, base, prompts)), "step": step}


async def _sweeps(request: web.Request) -> dict[str, Any]:
    run = await _run(request)
    named_path(run.folder, gallery.SWEEP)
    return {"sweeps": await _in_worker(lambda: gallery.swept(run.folder))}


async def _open(request: web.Request) -> dict[str, Any]:
    run = await _run(request)
    local = _is_local(request)
    path = str(run.folder) if local else f"output/{pack_output_dir().name}/{run.folder.name}"
    return {"opened": local and gallery.open_folder(run.folder), "path": path}


async def _delete(request: web.Request) -> dict[str, Any]:
    run = await _run(request)
    if active(run.folder.name) is not None:
        raise RouteError(409, "this run is in training: stop it first")
    return {"freed": await _in_worker(lambda: delete_run(run.folder))}


async def _run(request: web.Request) -> RunSummary:
    """The run named in the URL.

    Raises:
        RouteError: 400 if the name is invalid, 404 if there is no such run.
    """
    folder = run_folder(request)
    found = await _in_worker(lambda: summarise(folder))
    if found is None:
        raise RouteError(404, "run not found")
    return found


async def _run_and_step(request: web.Request) -> tuple[RunSummary, int, dict[str, Any]]:
    """The run, the step in the body (its own if there is none), and the body.

    Raises:
        RouteError: 400 if the run has not kept the LoRA of that step.
    """
    body = await json_body(request)
    run = await _run(request)
    step = body.get("step", run.step)
    if isinstance(step, bool) or not isinstance(step, int) or step not in run.saved:
        kept = ", ".join(map(str, run.saved[-8:])) or "none"
        raise RouteError(400, f"this run has not kept the LoRA of that step; it has {kept}")
    return run, step, body


def _is_local(request: web.Request) -> bool:
    """Whether the request comes from this machine itself, and not through a proxy."""
    if any(name in request.headers for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP")):
        return False
    try:
        return ipaddress.ip_address(request.remote or "").is_loopback
    except ValueError:
        return False


async def _in_worker(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_worker, work)
