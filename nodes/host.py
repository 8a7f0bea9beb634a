"""ComfyUI's services other than models: folders, memory, progress and cancelling."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image
from server import PromptServer

TEXT_INTERVAL = 0.3
"""Seconds between status lines: nobody can read more than a few per second, and each costs the server time."""


def pack_output_dir() -> Path:
    """The pack's folder inside ComfyUI's output folder, from which ``/view`` can serve images."""
    return Path(folder_paths.get_output_directory()) / "subjectbooth"


def user_folder() -> Path:
    """The pack's folder inside ComfyUI's user folder."""
    return Path(folder_paths.get_user_directory()) / "subjectbooth"


def loras_dirs() -> list[Path]:
    """ComfyUI's LoRA folders, in search order; the first is the default."""
    return [Path(folder) for folder in folder_paths.get_folder_paths("loras")]


def place_of(hidden: Any) -> dict[str, str]:
    """The node a message belongs to, and the id of its workflow ("" if unknown).

    Several open workflows may use the same node ids, as the example workflows do.
    """
    about = hidden.extra_pnginfo if isinstance(hidden.extra_pnginfo, dict) else {}
    workflow = about.get("workflow")
    found = workflow.get("id") if isinstance(workflow, dict) else None
    return {"node": str(hidden.unique_id), "workflow": found if isinstance(found, str) else ""}


def view_entry(path: Path) -> dict[str, str]:
    """An image in the output folder, as a node's ``ui`` refers to it."""
    relative = path.relative_to(folder_paths.get_output_directory())
    return {"filename": relative.name, "subfolder": relative.parent.as_posix(), "type": "output"}


def versioned_entry(path: Path) -> dict[str, str]:
    """The same for an image that may be overwritten: ``v`` busts the browser's cache, and ``/view`` ignores it."""
    try:
        version = str(path.stat().st_mtime_ns)
    except OSError:  # deleted meanwhile
        version = ""
    return {**view_entry(path), "v": version}


def release_models() -> None:
    """Unload all of ComfyUI's models from the device to make room for training."""
    # Unpatching writes to weights created in inference mode, which is only allowed in inference mode.
    with torch.inference_mode():
        comfy.model_management.unload_all_models()
    clean_up()


def clean_up() -> None:
    """Free memory that is no longer referenced."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def memory_in_use(device: torch.device) -> dict[str, str | int]:
    """Memory in use on the device in bytes; on a CPU, the memory of this process."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return {"of": "device", "used": torch.cuda.memory_reserved(device), "total": total}
    import psutil

    return {"of": "process", "used": psutil.Process().memory_info().rss, "total": psutil.virtual_memory().total}


Cancelled = comfy.model_management.InterruptProcessingException
"""Raised in a node when the user cancels: an Exception in ComfyUI 0.3, a BaseException in 0.33. So ``except Exception``
may or may not catch it."""


def stop_if_cancelled() -> None:
    """Raise if the user has cancelled; called between pieces of work.

    Raises:
        Cancelled: the user pressed cancel.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()


class Progress:
    """The node's progress bar, its status line and its preview.

    Args:
        node_id: from ``cls.hidden.unique_id``.
        total: the bar's maximum.
    """

    def __init__(self, node_id: str | None, total: int) -> None:
        self._node_id, self._total = node_id, total
        self._last_text = float("-inf")

    def update(self, value: int, text: str = "", preview: Image.Image | None = None) -> None:
        """Move the bar.

        Args:
            value: 0..total.
            text: a status line; updated at most a few times per second.
            preview: an image to show on the node.

        Raises:
            Cancelled: the user pressed cancel.
        """
        self.show(text, preview, value)

    def show(self, text: str, preview: Image.Image | None = None, value: int | None = None) -> None:
        """Show a status line and a preview; without a value, the bar stays full, for what is done after the work.

        Raises:
            Cancelled: the user pressed cancel.
        """
        value = self._total if value is None else value
        stop_if_cancelled()
        # Not through comfy.utils.ProgressBar, which in newer ComfyUIs drops updates of less than half a percent:
        # 24 of 25 steps in a run of 5,000.
        hook = comfy.utils.PROGRESS_BAR_HOOK
        if hook is not None:
            shown = ("JPEG", preview, 512) if preview is not None else None
            hook(min(value, self._total), self._total, shown, node_id=self._node_id)
        if text and time.monotonic() - self._last_text >= TEXT_INTERVAL:
            self.set_text(text)

    def set_text(self, text: str) -> None:
        """Show a status line immediately."""
        if self._node_id is not None:
            PromptServer.instance.send_progress_text(text, self._node_id)
        self._last_text = time.monotonic()


def readable_seconds(seconds: float | None) -> str:
    """``"1:05"`` or ``"2:01:05"``; ``"-"`` if unknown."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def as_image(picture: Image.Image) -> torch.Tensor:
    """A picture as IMAGE: float32 [1, h, w, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


def grid(images: torch.Tensor) -> Image.Image:
    """Images float32 [n, h, w, 3] in 0..1, tiled into a near-square."""
    count, height, width, _ = images.shape
    columns = int(count**0.5 + 0.999)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for number, image in enumerate((images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()):
        sheet.paste(Image.fromarray(image), (number % columns * width, number // columns * height))
    return sheet
