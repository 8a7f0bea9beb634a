"""Exceptions for failures of ComfyUI, with readable messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ComfyError(RuntimeError):
    """ComfyUI or one of its nodes failed; the message is meant for people."""


class ServerFailed(ComfyError):
    """The server did not start, or died."""


class PromptRejected(ComfyError):
    """ComfyUI rejected a prompt before running it. `node_errors`: its response, by node id."""

    def __init__(self, message: str, node_errors: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.node_errors = node_errors


class NodeFailed(ComfyError):
    """A node raised an exception. `node_message` is its error text."""

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
    """The message for a rejected prompt: ComfyUI's own error, then one line per node."""
    error = reason.get("error")
    message = f"{error.get('message')}: {error.get('details')}" if isinstance(error, Mapping) else str(error)
    lines = [f"ComfyUI rejected the prompt. {message}"]
    for node_id, report in (reason.get("node_errors") or {}).items():
        for problem in report.get("errors", []):
            where = f"{report.get('class_type')} (node {node_id})"
            lines.append(f"  {where}: {problem.get('message')}: {problem.get('details')}")
    return "\n".join(lines)
