"""The pack's HTTP routes: names in, JSON out. No name can lead to a file outside the pack's own folders.

The routes only serve the panels in the graph editor; no run depends on them.
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
from .graph_terms import error_in_graph
from .safe_paths import inside

PREFIX = "/subjectbooth"
LONGEST_NAME = 250
LONGEST_BODY = 64 * 1024

logger = logging.getLogger("subjectbooth")

Handler = Callable[[web.Request], Awaitable[Any]]
"""A handler: returns the data of the JSON response (or a complete ``web.StreamResponse``)."""


class RouteError(Exception):
    """Ends a request with a status and ``{"error": sentence}``."""

    def __init__(self, status: int, sentence: str) -> None:
        self.status = status
        super().__init__(sentence)


def serve(path: str, **handlers: Handler) -> None:
    """Register the handlers of one path, by method: ``serve("/runs/{name}", GET=show, DELETE=remove)``.

    Errors become JSON: the status of a :class:`RouteError`, 400 for a :class:`SubjectBoothError`, 405 for an
    unsupported method, 500 for anything else. Does nothing without a server (when a tool imports the nodes).

    Args:
        path: below :data:`PREFIX`; an aiohttp pattern, in which ``{name}`` matches one path segment.
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
            {"error": f"{request.method} is not allowed here; use {allowed}"}, status=405, headers={"Allow": allowed}
        )

    server.routes.route("*", PREFIX + path)(refuse)


def _in_json(handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            result = await handler(request)
        except RouteError as error:
            return web.json_response({"error": str(error)}, status=error.status)
        except SubjectBoothError as error:
            return web.json_response({"error": error_in_graph(error)}, status=400)
        except web.HTTPException:
            raise
        except Exception as error:
            # The error may name files of this machine: it belongs in the log, not in the response.
            logger.exception("%s %s failed", request.method, request.path)
            return web.json_response(
                {"error": f"internal error ({type(error).__name__}); see the server's log"}, status=500
            )
        if isinstance(result, web.StreamResponse):
            return result
        return web.json_response(result, headers={"Cache-Control": "no-store"})

    return answer


def named_path(root: Path, name: object, *, folders: bool = False) -> Path:
    """The path of an entry in one of the pack's own folders.

    Args:
        root: the folder.
        name: the name from the client, decoded.
        folders: whether subfolders are allowed, separated by ``/`` ("pets/rex.safetensors").

    Raises:
        RouteError: 400 if the name is invalid or leads out of the folder (``..``, an absolute path, a link).
    """
    if not isinstance(name, str) or not name or len(name) > LONGEST_NAME or any(ord(sign) < 32 for sign in name):
        raise RouteError(400, "invalid name")
    parts = PurePosixPath(name).parts
    # PurePosixPath drops "." and "//": only names in normal form are accepted.
    plain = "/".join(parts) == name and "\\" not in name and not (os.name == "nt" and ":" in name)
    if not plain or (len(parts) > 1 and not folders):
        raise RouteError(400, "the name leads out of the folder")
    try:
        path = inside(root, name, "name")
    except SubjectBoothError:  # which tells the user of a node what to do
        raise RouteError(400, "the name leads out of the folder") from None
    if path == root.resolve():  # through a link
        raise RouteError(400, "the name leads out of the folder")
    return path


async def json_body(request: web.Request) -> dict[str, Any]:
    """The request's body as a JSON object; an empty body gives an empty object.

    Raises:
        RouteError: 400 if it is not a JSON object, 413 if it is too long.
    """
    if (request.content_length or 0) > LONGEST_BODY:
        raise RouteError(413, f"the body is longer than {LONGEST_BODY} bytes")
    content = b""
    # A read returns what has arrived so far: over a network, a body comes in pieces.
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
    """A non-negative integer from the query (``?since=12``).

    Raises:
        RouteError: 400 if it is not one.
    """
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise RouteError(400, f"{name} is not a whole number")
    return int(text)
