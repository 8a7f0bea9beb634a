"""A real ComfyUI as a child process, and a client of its HTTP and websocket API.

The demo, the scripts and the tests all drive ComfyUI through this package, as any external program would: nothing of
ComfyUI is imported here. Needs only the standard library and aiohttp (one of ComfyUI's requirements).
"""

from .client import ComfyClient, Prompt
from .errors import ComfyError, Interrupted, NodeFailed, PromptRejected, ServerFailed
from .events import ENDS, Event, RunResult
from .server import (
    FP32_FLAGS,
    ComfyServer,
    copy_file,
    exit_on_sigterm,
    find_comfyui,
    free_port,
    link_directory,
)

__all__ = [
    "ENDS",
    "FP32_FLAGS",
    "ComfyClient",
    "ComfyError",
    "ComfyServer",
    "Event",
    "Interrupted",
    "NodeFailed",
    "Prompt",
    "PromptRejected",
    "RunResult",
    "ServerFailed",
    "copy_file",
    "exit_on_sigterm",
    "find_comfyui",
    "free_port",
    "link_directory",
]
