"""ComfyUI's websocket events, and the result of a prompt."""

from __future__ import annotations

import json
import struct
import time
from dataclasses import dataclass, field
from typing import Any

ENDS = ("execution_success", "execution_error", "execution_interrupted")
"""Event types that end a prompt."""


@dataclass(frozen=True)
class Event:
    """One websocket message.

    `type` is ComfyUI's name ("progress", "executing", ...); binary messages become "preview" (`data`: `node`,
    `prompt_id`, `mime`, `image` bytes) and "progress_text" (`data`: `node`, `text`). `time` is time.monotonic().
    """

    type: str
    data: dict[str, Any]
    time: float

    @property
    def prompt_id(self) -> str | None:
        return self.data.get("prompt_id")


@dataclass(frozen=True)
class RunResult:
    """The result of one prompt. `outputs`: node id -> its `ui` output. `cached`: nodes that did not run again."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]
    cached: frozenset[str]
    entry: dict[str, Any]
    events: list[Event] = field(repr=False)
    seconds: float = 0.0

    def executed(self) -> list[str]:
        """Node ids in the order in which they started."""
        return [e.data["node"] for e in self.events if e.type == "executing" and e.data.get("node") is not None]

    def of_type(self, type: str) -> list[Event]:
        return [e for e in self.events if e.type == type]

    def images(self, node_id: str) -> list[dict[str, str]]:
        """The image records ({filename, subfolder, type}) that a node showed."""
        return list(self.outputs[node_id]["images"])


def binary_event(message: bytes) -> Event | None:
    """Parse ComfyUI's binary websocket messages (protocol.py, BinaryEventTypes)."""
    (kind,) = struct.unpack(">I", message[:4])
    body = message[4:]
    now = time.monotonic()
    if kind == 1:  # a preview without metadata: 4 bytes of format, then the image
        (image_format,) = struct.unpack(">I", body[:4])
        mime = "image/png" if image_format == 2 else "image/jpeg"
        return Event("preview", {"mime": mime, "image": bytes(body[4:])}, now)
    if kind == 3:  # a line of text for a node: length of the node id, the id, the text
        (length,) = struct.unpack(">I", body[:4])
        node = body[4 : 4 + length].decode("utf-8")
        return Event("progress_text", {"node": node, "text": body[4 + length :].decode("utf-8")}, now)
    if kind == 4:  # a preview with metadata: length of the JSON text, the text, the image
        (length,) = struct.unpack(">I", body[:4])
        metadata = json.loads(body[4 : 4 + length])
        return Event(
            "preview",
            {
                "mime": metadata.get("image_type", ""),
                "image": bytes(body[4 + length :]),
                "node": metadata.get("node_id"),
                "prompt_id": metadata.get("prompt_id"),
            },
            now,
        )
    return None
