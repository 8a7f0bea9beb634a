"""LoadDemoBase: loads the small model that ships with the pack; there is nothing to download."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..demo.base import NAME, ensure_checkpoint
from ..trainer.errors import SubjectBoothError
from .graph_terms import graph_messages
from .host import Progress, user_folder
from .presentation import presented
from .types import CATEGORY

logger = logging.getLogger("subjectbooth")


def demo_base_folder() -> Path:
    """Where to write the demo base: the checkpoints folder, so that ordinary checkpoint loaders list it too.

    Falls back to ComfyUI's user folder if the models folder is not writable (a shared or read-only installation).
    """
    for folder in map(Path, folder_paths.get_folder_paths("checkpoints")):
        if folder.is_dir() and os.access(folder, os.W_OK):
            return folder / "subjectbooth"
    models = Path(folder_paths.models_dir)
    new = models if models.is_dir() else models.parent  # of a base directory in which nothing is yet
    if new.is_dir() and os.access(new, os.W_OK):
        return models / "checkpoints" / "subjectbooth"
    return user_folder()


def _written_demo_base() -> Path:
    """The path of the checkpoint, which is written first if it is missing.

    Raises:
        SubjectBoothError: the disk is full, or no folder is writable.
    """
    folder = demo_base_folder()
    try:
        try:
            return ensure_checkpoint(folder)
        except PermissionError:  # Windows reports a protected folder only now
            folder = user_folder()
            return ensure_checkpoint(folder)
    except OSError as error:
        raise SubjectBoothError(
            f"the demo base cannot be written ({error.strerror or type(error).__name__})",
            "460 MB of disk space and write permission",
            "free some space or make the folder writable",
            str(folder),
        ) from error


def _shown(folder: Path) -> str:
    """A folder as people know it: from ComfyUI's own folder if it is there."""
    home = Path(folder_paths.models_dir).parent
    return folder.relative_to(home).as_posix() if folder.is_relative_to(home) else str(folder)


class LoadDemoBase(io.ComfyNode):
    """Writes the demo base once, as a checkpoint in Stable Diffusion 1.5's layout, and loads it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as ComfyUI shows it."""
        schema = io.Schema(
            node_id="LoadDemoBase",
            display_name="Load Demo Base",
            category=CATEGORY,
            description=(
                "Loads a small text-to-image model that ships with the pack and draws emoji-like images of 64 x 64 "
                "pixels. Use it to try DreamBooth on any machine; for your own photos, use a real checkpoint. The "
                "first run writes it (466 MB) to models/checkpoints/subjectbooth; delete it there when you are done."
            ),
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The demo base's UNet. Sample it at 64 x 64 pixels."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder. It knows about a hundred class words."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder."),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return presented(schema)

    @classmethod
    @graph_messages()
    def execute(cls) -> io.NodeOutput:
        """Make sure that the file exists and is intact, and load it like any checkpoint."""
        folders = (demo_base_folder(), user_folder())
        is_new = not any((folder / NAME).is_file() for folder in folders)
        progress = Progress(cls.hidden.unique_id, 1)
        if is_new:
            progress.set_text(f"writing 466 MB, once, to {_shown(folders[0])}")
        path = _written_demo_base()
        if is_new:
            progress.set_text(f"466 MB written to {_shown(path.parent)}")
        model, clip, vae = comfy.sd.load_checkpoint_guess_config(
            str(path), embedding_directory=folder_paths.get_folder_paths("embeddings")
        )[:3]
        return io.NodeOutput(model, clip, vae)
