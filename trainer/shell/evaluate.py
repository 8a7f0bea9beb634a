"""``python -m trainer evaluate``: measures what a LoRA does to its base, and writes a report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..base.stored.stored_base import load_base, stored_resolution
from ..config import TrainConfig
from ..errors import SubjectBoothError
from ..files.storage import disk_errors, make_folder, read_chosen_file, user_path, write_atomic
from ..machine.runtime import choose_precision, default_device
from ..measure.drawer import Drawer
from ..measure.embedding import Embedder, from_folder
from ..measure.evaluation import Evaluation, evaluate
from ..measure.prompts import OTHER_PROMPTS, PromptSet, prompt_set
from ..measure.report import as_csv, as_json, grid, markdown
from ..runs.lora_reader import read_lora, trigger_words
from ..subject.photo_files import read_photos
from ..subject.photos import list_photos
from ..subject.subject import check_resolution
from ..subject.trigger import DEFAULT_TOKEN, check_word
from .demo_parts import DEMO, MeasureSetup, demo_setup
from .exit_code import exit_code_of
from .options import add_base_options


def parser() -> argparse.ArgumentParser:
    """The options of the evaluate command."""
    options = argparse.ArgumentParser(
        prog="python -m trainer evaluate",
        description="Draws the same prompts and seeds with and without a LoRA, and measures how far the class and "
        "other things have changed, how similar the subject is to its photos, and how varied it is. Writes report.md, "
        "figures.json, figures.csv and grid.png. See docs/evaluating.md.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_base_options(options)
    options.add_argument("--lora", type=user_path, required=True, help="LoRA file (.safetensors).")
    options.add_argument(
        "--embedder",
        required=True,
        help="What pictures are compared with: a folder with CLIP or DINOv2 as transformers saves it (config.json and "
        f'safetensors), or "{DEMO}" for the judge of the demo base, which is part of a clone of the repository. '
        "Nothing is downloaded.",
    )
    options.add_argument(
        "--class_word",
        "--class-word",
        help='The kind of thing the subject is, such as "dog". Default: from the LoRA\'s metadata.',
    )
    options.add_argument(
        "--token", help=f"The token that stands for the subject. Default: from the LoRA's metadata, or {DEFAULT_TOKEN}."
    )
    options.add_argument(
        "--photos", type=user_path, help="Folder with photos of the subject, for the figures that compare with them."
    )
    options.add_argument("--seeds", type=int, default=4, help="Pictures per prompt, 2 or more.")
    options.add_argument("--first_seed", type=int, default=0, help="Seed of the first picture of each prompt.")
    options.add_argument(
        "--prompts",
        type=user_path,
        help="Text file with prompts of other things, one per line. Default: 24 prompts for any base, or 24 of the "
        "demo base's own with its judge.",
    )
    options.add_argument(
        "--resolution",
        type=int,
        help="Side of the pictures in pixels. Default: the native size of the base; 64 with the demo base's judge.",
    )
    options.add_argument("--steps", type=int, help="Denoising steps. Default: 20; 15 with the judge.")
    options.add_argument(
        "--guidance_scale", type=float, help="Classifier-free guidance scale (CFG). Default: 7; 2 with the judge."
    )
    options.add_argument(
        "--output_dir",
        type=user_path,
        default=Path("subjectbooth_evaluation"),
        help="Folder for the report; files of an earlier one are replaced.",
    )
    options.add_argument("--cpu", action="store_true", help="Use the CPU even if there is a GPU.")
    return options


def main(arguments: Sequence[str]) -> int:
    """Evaluate; returns the exit code. Errors go to stderr without a traceback."""
    options = parser().parse_args(arguments)
    return exit_code_of(lambda: print(_evaluate(options)), "stopped; nothing was written")


def _evaluate(options: argparse.Namespace) -> str:
    """Write the report; returns the table, with the folder."""
    _check(options)
    tensors, metadata = read_lora(options.lora)
    prompts_of_user = _read_prompts(options.prompts) if options.prompts is not None else None
    photos = _read_photos(options.photos) if options.photos is not None else []
    device = torch.device("cpu") if options.cpu else default_device()
    setup = demo_setup() if options.embedder == DEMO else MeasureSetup(
        from_folder(user_path(options.embedder), device), OTHER_PROMPTS
    )  # fmt: skip
    setup = _with_options(setup, options)
    prompts = _prompts(options, metadata, prompts_of_user or setup.others)
    with disk_errors("the report cannot be written", options.output_dir):
        make_folder(options.output_dir)  # now rather than after an hour of drawing
    base = load_base(options.base, options.clip_skip, options.prediction_type, device)
    draw = Drawer(
        base,
        tensors,
        options.lora.name,
        prompts.all,
        setup.resolution or stored_resolution(options.base, options.prediction_type),
        setup.steps,
        setup.guidance_scale,
        device,
        choose_precision(TrainConfig(), device)[0],
    )
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    result = _with_progress(draw, setup.embedder, prompts, seeds, photos)
    _write(result, options.output_dir)
    return f"{markdown(result)}\nreport: {options.output_dir / 'report.md'}, {options.output_dir / 'grid.png'}"


def _with_progress(
    draw: Drawer, embedder: Embedder, prompts: PromptSet, seeds: Sequence[int], photos: Sequence[torch.Tensor]
) -> Evaluation:
    from tqdm import tqdm

    with tqdm(total=2 * len(seeds) * len(prompts.all), unit="picture", dynamic_ncols=True) as bar:
        for event in evaluate(draw, embedder, prompts, seeds, photos):
            if isinstance(event, Evaluation):
                return event
            bar.update(event.done - bar.n)
    raise AssertionError("evaluate always ends with the evaluation")


def _write(result: Evaluation, folder: Path) -> None:
    with disk_errors("the report cannot be written", folder):
        write_atomic(folder / "report.md", f"{markdown(result)}\n![Before and after](grid.png)\n")
        write_atomic(folder / "figures.json", as_json(result))
        write_atomic(folder / "figures.csv", as_csv(result))
        write_atomic(folder / "grid.png", grid(result).save)


def _check(options: argparse.Namespace) -> None:
    """Check the numbers before anything is read."""
    limits: dict[str, tuple[float, float, str]] = {
        "seeds": (2, 64, "use 4"),
        "first_seed": (0, 2**63 - 65, "use 0"),
        "steps": (1, 1000, "use 20"),
        "guidance_scale": (1, 100, "use 7, the usual value, or 1 for no guidance"),
    }
    for name, (low, high, todo) in limits.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise SubjectBoothError(f"{name} {value:g}", f"a number from {low:g} to {high:g}", todo, name)
    if options.resolution is not None:
        check_resolution(options.resolution)


def _prompts(options: argparse.Namespace, metadata: dict[str, str], others: Sequence[str]) -> PromptSet:
    """The prompts, with class word and token from the options or the LoRA."""
    class_word = options.class_word
    if class_word is None:
        class_word = metadata.get("subjectbooth.class_word")
        if class_word is None:
            raise SubjectBoothError(
                "the LoRA does not say what kind of thing its subject is",
                "a class word, such as dog",
                "add --class_word",
                options.lora.name,
            )
    class_word = check_word(class_word, "class_word", "dog")
    trigger = trigger_words(metadata) if options.token is None and options.class_word is None else ""
    token = options.token or metadata.get("subjectbooth.token", DEFAULT_TOKEN)
    return prompt_set(class_word, trigger or f"{check_word(token, 'token', DEFAULT_TOKEN)} {class_word}", others)


def _read_prompts(path: Path) -> list[str]:
    content = read_chosen_file(path, "the prompts")
    try:
        lines = [" ".join(line.split()) for line in content.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise SubjectBoothError(
            f"{path.name} is not a text file in UTF-8", "one prompt per line", "save it as UTF-8", path.name
        ) from error
    if not any(lines):
        raise SubjectBoothError(f"{path.name} contains no prompts", "one prompt per line", "add some", path.name)
    return [line for line in lines if line]


def _read_photos(folder: Path) -> list[torch.Tensor]:
    """Float32 [3, h, w] in 0..1 each."""
    photos, notes = read_photos(list_photos(folder), "template")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return [torch.from_numpy(photo.pixels).permute(2, 0, 1).float() / 255 for photo in photos]


def _with_options(setup: MeasureSetup, options: argparse.Namespace) -> MeasureSetup:
    given = {name: getattr(options, name) for name in ("resolution", "steps", "guidance_scale")}
    return replace(setup, **{name: value for name, value in given.items() if value is not None})
