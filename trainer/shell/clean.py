"""``python -m trainer clean``: show what could go from the disk, and with ``--yes`` remove it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import SubjectBoothError
from ..files.storage import disk_errors, user_path
from ..runs.cleanup import (
    DEFAULT_LIMIT,
    choose_removable,
    format_size,
    parse_size,
    remembered_lora_folders,
    remove_items,
    survey,
)
from .terms import error_in_shell

PACK_FOLDER = Path(__file__).resolve().parent.parent


def parser() -> argparse.ArgumentParser:
    """The options of the clean-up."""
    options = argparse.ArgumentParser(
        prog="python -m trainer clean",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Shows the oldest runs and class images that no LoRA needs, as many as are over the limit. "
        "Removes them with --yes. Never touches what lies in LoRA folders, nor a run that is going on.",
    )
    options.add_argument(
        "--limit", default=format_size(DEFAULT_LIMIT).replace(" ", ""), help="What may stay: 5GB, 500MB."
    )
    options.add_argument(
        "--output_dir",
        type=user_path,
        help="ComfyUI's output/subjectbooth, or the --output_dir of a training from a shell. Found "
        "by itself when the pack lies in ComfyUI's custom_nodes.",
    )
    options.add_argument(
        "--loras",
        type=user_path,
        action="append",
        help="Folder with LoRAs; may be given several times. Found likewise, and those of "
        "extra_model_paths.yaml once a run has ended in ComfyUI.",
    )
    options.add_argument("--yes", action="store_true", help="Remove what is shown.")
    return options


def main(arguments: Sequence[str]) -> int:
    """Show, and with ``--yes`` remove; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        limit = parse_size(options.limit)
        with disk_errors("the folders of runs and LoRAs cannot be read", options.output_dir or Path.cwd()):
            output, runs, loras = _find_folders(options.output_dir, options.loras)
            items = survey(runs, output / "class_images", loras)
    except SubjectBoothError as error:
        print(error_in_shell(error), file=sys.stderr)
        return 2
    total, chosen = sum(item.size for item in items), choose_removable(items, limit)
    print(f"{output}: {len(items)} runs and sets of class images, {format_size(total)}; limit {format_size(limit)}")
    print(f"LoRAs looked for in {', '.join(map(str, loras))}")
    for item in items:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.changed))
        what = "goes" if item in chosen else f"stays ({item.keep_reason})" if item.keep_reason else "stays"
        print(f"  {changed}  {format_size(item.size):>10}  {item.kind:12}  {item.path.name}  {what}")
    going = sum(item.size for item in chosen)
    if total - going > limit:
        print(f"What has to stay takes {format_size(total - going)}, more than the limit.")
    if not chosen:
        print("Nothing is to be removed.")
    elif options.yes:
        print(f"Removed {format_size(remove_items(chosen))}.")
    else:
        print(f"With --yes {format_size(going)} would be removed. Nothing has been removed now.")
    return 0


def _find_folders(output: Path | None, loras: list[Path] | None) -> tuple[Path, Path, list[Path]]:
    """Where to look.

    Raises:
        SubjectBoothError: there is no such folder.
    """
    # Not resolved: the pack may be a link in custom_nodes, and who stands in it means that ComfyUI.
    places = [place.parent.parent for place in (Path.cwd(), PACK_FOLDER) if place.parent.name == "custom_nodes"]
    if output is None:
        found = [place / "output" / "subjectbooth" for place in places] + [Path("subjectbooth_output")]
        output = next((folder for folder in found if folder.is_dir()), None)
    if output is None or not output.is_dir():
        raise SubjectBoothError(
            f"no folder with runs{f' at {output}' if output else ''}",
            "where they are",
            "give it with --output_dir",
            "clean",
        )
    runs = output / "runs" if (output / "runs").is_dir() else output
    if loras is None:  # beside the runs of a training from a shell lie its LoRAs
        found = [output] if runs != output else [place / "models" / "loras" for place in places]
        loras = [folder for folder in found if folder.is_dir()]
        loras += [folder for folder in remembered_lora_folders(output) if folder not in loras]
    missing = [folder for folder in loras if not folder.is_dir()]
    if missing or not loras:
        raise SubjectBoothError(
            f"no folder with LoRAs{f' at {missing[0]}' if missing else ''}",
            "ComfyUI's LoRA folders: the runs of what is in them stay",
            "plug in its drive, or give all LoRA folders with --loras",
            "clean",
        )
    return output, runs, loras
