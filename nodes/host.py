"""What the nodes need of ComfyUI besides models: folders, memory, progress and cancelling."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from PIL import Image
from server import PromptServer

TEXT_INTERVAL = 0.3
"""Seconds between two status lines; more often than a few a second nobody can read, and each costs the server time."""


def pack_output_dir() -> Path:
    """The pack's folder in ComfyUI's output folder, where ``/view`` can show what is in it."""
    return Path(folder_paths.get_output_directory()) / "subjectbooth"


def loras_dirs() -> list[Path]:
    """ComfyUI's LoRA folders, the one in which it looks first and users look too at the head."""
    return [Path(folder) for folder in folder_paths.get_folder_paths("loras")]


def place_of(hidden: Any) -> dict[str, str]:
    """Whose a message is: the node, and the workflow that it was queued from ("" where nobody says).

    Workflows that lie open side by side, the examples for one, number their nodes alike.
    """
    about = hidden.extra_pnginfo if isinstance(hidden.extra_pnginfo, dict) else {}
    workflow = about.get("workflow")
    found = workflow.get("id") if isinstance(workflow, dict) else None
    return {"node": str(hidden.unique_id), "workflow": found if isinstance(found, str) else ""}


def view_entry(path: Path) -> dict[str, str]:
    """How a node's ``ui`` names a picture that lies in the output folder."""
    relative = path.relative_to(folder_paths.get_output_directory())
    return {"filename": relative.name, "subfolder": relative.parent.as_posix(), "type": "output"}


def versioned_entry(path: Path) -> dict[str, str]:
    """The same for a picture that may be drawn anew under its name. ``/view`` ignores ``v``; a cache does not."""
    try:
        version = str(path.stat().st_mtime_ns)
    except OSError:  # somebody has removed it
        version = ""
    return {**view_entry(path), "v": version}


def release_models() -> None:
    """Have ComfyUI take all its models off the device, so that training has it for itself."""
    # Un-patching writes to weights that were made in inference mode, and that is only allowed in inference mode.
    with torch.inference_mode():
        comfy.model_management.unload_all_models()
    clean_up()


def clean_up() -> None:
    """Give memory back that nothing refers to any more."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def memory_in_use(device: torch.device) -> dict[str, str | int]:
    """What is in use on the device, in bytes; on a CPU, what this process has of the machine's memory."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return {"of": "device", "used": torch.cuda.memory_reserved(device), "total": total}
    import psutil

    return {"of": "process", "used": psutil.Process().memory_info().rss, "total": psutil.virtual_memory().total}


Cancelled = comfy.model_management.InterruptProcessingException
"""What ends a node when the user presses cancel: an Exception in ComfyUI 0.3, a BaseException by 0.33, so that
``except Exception`` cannot be relied on to catch it, nor to let it pass."""


def stop_if_cancelled() -> None:
    """Ask whether the user pressed cancel, as often as there is something to stop between.

    Raises:
        Cancelled: yes.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()


class Progress:
    """The node's progress bar, its status line and its preview.

    Args:
        node_id: from ``cls.hidden.unique_id``.
        total: of the bar.
    """

    def __init__(self, node_id: str | None, total: int) -> None:
        self._node_id, self._total = node_id, total
        self._last_text = float("-inf")

    def update(self, value: int, text: str = "", preview: Image.Image | None = None) -> None:
        """Move the bar.

        Args:
            value: 0..total.
            text: a status line; shown a few times a second at most.
            preview: a picture to show on the node.

        Raises:
            Cancelled: the user pressed cancel.
        """
        stop_if_cancelled()
        # Not through comfy.utils.ProgressBar, which in newer ComfyUIs drops what is less than half a percent further:
        # 24 of 25 steps of a training of 5,000.
        hook = comfy.utils.PROGRESS_BAR_HOOK
        if hook is not None:
            shown = ("JPEG", preview, 512) if preview is not None else None
            hook(min(value, self._total), self._total, shown, node_id=self._node_id)
        if text and time.monotonic() - self._last_text >= TEXT_INTERVAL:
            self.say(text)

    def say(self, text: str) -> None:
        """Show a status line at once."""
        if self._node_id is not None:
            PromptServer.instance.send_progress_text(text, self._node_id)
        self._last_text = time.monotonic()


def readable_seconds(seconds: float | None) -> str:
    """``"1:05"`` or ``"2:01:05"``; ``"-"`` while nothing is known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def grid(images: torch.Tensor) -> Image.Image:
    """Pictures float32 [n, h, w, 3] in 0..1, side by side in a near-square."""
    count, height, width, _ = images.shape
    columns = int(count**0.5 + 0.999)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for number, image in enumerate((images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()):
        sheet.paste(Image.fromarray(image), (number % columns * width, number // columns * height))
    return sheet
