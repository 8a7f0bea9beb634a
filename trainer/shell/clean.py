"""``python -m trainer clean``: lists unused runs and class images, and removes them with ``--yes``."""

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

PACK_FOLDER = Path(__file__).resolve().parents[2]


def parser() -> argparse.ArgumentParser:
    """The options of the clean command."""
    options = argparse.ArgumentParser(
        prog="python -m trainer clean",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Lists the oldest runs and class images that no LoRA needs, and of the runs that stay the LoRAs of "
        "other steps than the one in use, as many as exceed the limit, and removes them with --yes. LoRA folders and "
        "runs in progress are never touched.",
    )
    options.add_argument(
        "--limit",
        default=format_size(DEFAULT_LIMIT).replace(" ", ""),
        help="Disk space to stay within, such as 5GB or 500MB.",
    )
    options.add_argument(
        "--output_dir",
        type=user_path,
        help="ComfyUI's output/subjectbooth, or the --output_dir of a training from a shell. Found "
        "automatically if the pack is in ComfyUI's custom_nodes.",
    )
    options.add_argument(
        "--loras",
        type=user_path,
        action="append",
        help="LoRA folder; may be given several times. Also found automatically; folders from "
        "extra_model_paths.yaml are known after a run has finished in ComfyUI.",
    )
    options.add_argument("--yes", action="store_true", help="Remove the listed runs and class images.")
    return options


def main(arguments: Sequence[str]) -> int:
    """List, and with ``--yes`` remove; returns the exit code."""
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
    count = len({item.path for item in items})
    print(f"{output}: {count} runs and sets of class images, {format_size(total)}; limit {format_size(limit)}")
    print(f"LoRAs searched in {', '.join(map(str, loras))}")
    for item in items:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.changed))
        action = "remove" if item in chosen else f"keep ({item.keep_reason})" if item.keep_reason else "keep"
        print(f"  {changed}  {format_size(item.size):>10}  {item.kind:12}  {item.path.name}  {action}")
    removable = sum(item.size for item in chosen)
    if total - removable > limit:
        print(f"The runs and class images still in use take {format_size(total - removable)}, more than the limit.")
    if not chosen:
        print("Nothing to remove.")
    elif options.yes:
        print(f"Removed {format_size(remove_items(chosen))}.")
    else:
        print(f"Nothing was removed. With --yes, {format_size(removable)} are removed.")
    return 0


def _find_folders(output: Path | None, loras: list[Path] | None) -> tuple[Path, Path, list[Path]]:
    """The output folder, the folder of runs, and the LoRA folders.

    Raises:
        SubjectBoothError: a folder was not found.
    """
    # The working directory is not resolved: the pack may be a link in the custom_nodes of the ComfyUI that is meant.
    places = [place.parent.parent for place in (Path.cwd(), PACK_FOLDER) if place.parent.name == "custom_nodes"]
    if output is None:
        found = [place / "output" / "subjectbooth" for place in places] + [Path("subjectbooth_output")]
        output = next((folder for folder in found if folder.is_dir()), None)
    if output is None or not output.is_dir():
        raise SubjectBoothError(
            f"folder of runs not found{f': {output}' if output else ''}",
            "the folder that contains runs and class_images",
            "pass it as --output_dir",
        )
    runs = output / "runs" if (output / "runs").is_dir() else output
    if loras is None:  # a training from a shell saves its LoRAs next to the runs
        found = [output] if runs != output else [place / "models" / "loras" for place in places]
        loras = [folder for folder in found if folder.is_dir()]
        loras += [folder for folder in remembered_lora_folders(output) if folder not in loras]
    missing = [folder for folder in loras if not folder.is_dir()]
    if missing or not loras:
        raise SubjectBoothError(
            f"LoRA folder not found{f': {missing[0]}' if missing else ''}",
            "all of ComfyUI's LoRA folders, because the runs of existing LoRAs are kept",
            "plug in its drive, or pass all LoRA folders with --loras",
        )
    return output, runs, loras
