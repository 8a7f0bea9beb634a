"""The pack's HTTP routes: names in, JSON out, and no way from a name to a file outside the pack's own folders.

Nothing that a run needs goes through here: the routes only serve the panels in the graph editor.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path, PurePosixPath
from typing import Any

from aiohttp import web
from server import PromptServer

from ..trainer.errors import SubjectBoothError
from .safe_paths import inside

PREFIX = "/subjectbooth"
LONGEST_NAME = 250
LONGEST_BODY = 64 * 1024

logger = logging.getLogger("subjectbooth")

Answer = Callable[[web.Request], Awaitable[Any]]
"""A handler: takes the request and returns what becomes the JSON answer (or a finished ``web.StreamResponse``)."""


class RouteError(Exception):
    """Ends a request with a status and ``{"error": sentence}``."""

    def __init__(self, status: int, sentence: str) -> None:
        self.status = status
        super().__init__(sentence)


def serve(path: str, **handlers: Answer) -> None:
    """Register the handlers of one path, by method: ``serve("/runs/{name}", GET=show, DELETE=remove)``.

    Errors become JSON: 400, 404 ... by :class:`RouteError`, 400 for a :class:`SubjectBoothError`, 405 for a method
    that is not served, 500 for anything else. Without a server (the nodes imported by some tool) nothing happens.

    Args:
        path: below :data:`PREFIX`; aiohttp's pattern, in which ``{name}`` takes one part between slashes.
        handlers: by method name.
    """
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    for method, handler in handlers.items():
        server.routes.route(method, PREFIX + path)(_in_json(handler))
    allowed = ", ".join(sorted(handlers))

    async def refuse(request: web.Request) -> web.Response:
        return web.json_response(
            {"error": f"{request.method} is not served here; {allowed} is"}, status=405, headers={"Allow": allowed}
        )

    server.routes.route("*", PREFIX + path)(refuse)


def _in_json(handler: Answer) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            result = await handler(request)
        except RouteError as error:
            return web.json_response({"error": str(error)}, status=error.status)
        except SubjectBoothError as error:
            return web.json_response({"error": str(error)}, status=400)
        except web.HTTPException:
            raise
        except Exception as error:
            # What went wrong may name files of this machine: it belongs into the log, not into the answer.
            logger.exception("%s %s failed", request.method, request.path)
            return web.json_response({"error": f"the server failed here ({type(error).__name__})"}, status=500)
        if isinstance(result, web.StreamResponse):
            return result
        return web.json_response(result, headers={"Cache-Control": "no-store"})

    return answer


def named_path(root: Path, name: object, *, folders: bool = False) -> Path:
    """The path of something in one of the pack's own folders, by the one spelling of its name.

    Args:
        root: the folder.
        name: what the client sent, decoded.
        folders: whether the name may have sub-folders, written with ``/`` ("pets/rex.safetensors").

    Raises:
        RouteError: 400 for what is no name, or leads out of the folder (``..``, an absolute path, a link).
    """
    if not isinstance(name, str) or not name or len(name) > LONGEST_NAME or any(ord(sign) < 32 for sign in name):
        raise RouteError(400, "that is not a name")
    parts = PurePosixPath(name).parts
    # PurePosixPath drops "." and "//": a name that is not its own normal form is refused as a whole.
    plain = "/".join(parts) == name and "\\" not in name and not (os.name == "nt" and ":" in name)
    if not plain or (len(parts) > 1 and not folders):
        raise RouteError(400, "that is not a name inside the folder")
    try:
        path = inside(root, name, "name")
    except SubjectBoothError:  # which tells the user of a node what to do
        raise RouteError(400, "that is not a name inside the folder") from None
    if path == root.resolve():  # through a link
        raise RouteError(400, "that is not a name inside the folder")
    return path


async def json_body(request: web.Request) -> dict[str, Any]:
    """The request's body, a JSON object; an empty body is an empty one.

    Raises:
        RouteError: 400 for anything else, 413 for a long one.
    """
    if (request.content_length or 0) > LONGEST_BODY:
        raise RouteError(413, f"the body is longer than {LONGEST_BODY} bytes")
    content = b""
    # A read gives what has come so far: over a network a body arrives in pieces.
    while len(content) <= LONGEST_BODY and (piece := await request.content.read(LONGEST_BODY + 1 - len(content))):
        content += piece
    if len(content) > LONGEST_BODY:
        raise RouteError(413, f"the body is longer than {LONGEST_BODY} bytes")
    try:
        values = json.loads(content) if content else {}
    except (ValueError, RecursionError):
        raise RouteError(400, "the body is not JSON") from None
    if not isinstance(values, dict):
        raise RouteError(400, "the body is not a JSON object")
    return values


def query_int(request: web.Request, name: str, default: int = 0) -> int:
    """A whole number of 0 or more out of the query (``?since=12``).

    Raises:
        RouteError: 400 when it is not one.
    """
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise RouteError(400, f"{name} is not a whole number")
    return int(text)
