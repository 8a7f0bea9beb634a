"""What can go wrong at or in ComfyUI, as exceptions whose messages a person can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ComfyError(RuntimeError):
    """Something went wrong at or in ComfyUI; the message is meant to be read by a person."""


class ServerFailed(ComfyError):
    """The server did not start, or died."""


class PromptRejected(ComfyError):
    """ComfyUI refused a prompt before running it. `node_errors` is what it answered, by node id."""

    def __init__(self, message: str, node_errors: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.node_errors = node_errors


class NodeFailed(ComfyError):
    """A node raised while it ran. `node_message` is its own error text."""

    def __init__(self, message: str, node_id: str, node_type: str, node_message: str, exception_type: str) -> None:
        super().__init__(message)
        self.node_id = node_id
        self.node_type = node_type
        self.node_message = node_message
        self.exception_type = exception_type


class Interrupted(ComfyError):
    """The prompt was cancelled. `entry` is its history entry."""

    def __init__(self, message: str, entry: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.entry = entry


def rejection(reason: Mapping[str, Any]) -> str:
    """ComfyUI's refusal of a prompt as lines: what it says itself, then every node's problem."""
    error = reason.get("error")
    said = f"{error.get('message')}: {error.get('details')}" if isinstance(error, Mapping) else str(error)
    lines = [f"ComfyUI refused the prompt. {said}"]
    for node_id, report in (reason.get("node_errors") or {}).items():
        for problem in report.get("errors", []):
            where = f"{report.get('class_type')} (node {node_id})"
            lines.append(f"  {where}: {problem.get('message')}: {problem.get('details')}")
    return "\n".join(lines)
