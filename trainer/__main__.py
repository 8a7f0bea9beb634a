"""The same trainer from a shell: ``python -m trainer --base model.safetensors --photos folder --class-word dog``.

``python -m trainer clean`` shows which old runs and class images could go from the disk.

Also runs under ``accelerate launch --num_processes 1 -m trainer ...``. Ctrl+C, SIGTERM (``kill``, ``timeout``, a job
scheduler), SIGHUP (a closed terminal) and Ctrl+Break keep the steps so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

import torch

from .base.base_model import BaseModel
from .base.sd.families import FAMILIES
from .base.sd.schedule import PREDICTION_TYPES
from .base.sd.tokenizer import tokenize
from .base.stored.stored_base import load_base, stored_resolution
from .config import TrainConfig
from .errors import SubjectBoothError
from .events import Adjusted, Finished, Started, StepDone, Validation
from .files.storage import user_path
from .machine.runtime import choose_precision, default_device
from .preserve.generate import generate
from .preserve.priors import ClassPriors
from .preserve.ways import keeping_class
from .runs.publish import check_folder, checked_name, publish
from .runs.run import Run
from .shell.clean import main as clean
from .shell.terms import error_in_shell, note_in_shell
from .shell.trackers import TRACKERS, Tracker
from .subject.captions import DEFAULT_TEMPLATE
from .subject.crops import CROPS
from .subject.photo_files import CAPTIONS, read_photos
from .subject.photos import list_photos
from .subject.subject import Subject, caption_lines, make_subject
from .subject.trigger import DEFAULT_TOKEN

_DEADLY = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))
"""Signals that end a program without a word unless it listens; which of them there are depends on the system."""


class _Ended(KeyboardInterrupt):
    """A signal that ends the program, as Ctrl+C does."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def parser() -> argparse.ArgumentParser:
    """The options: the trainer's settings under their own names, and what a graph would wire."""
    options = argparse.ArgumentParser(
        prog="python -m trainer",
        description="DreamBooth as LoRA on a Stable Diffusion checkpoint (1.x, 2.x, SDXL).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument(
        "--base", type=user_path, required=True, help="Checkpoint (.safetensors), or a folder as diffusers saves it."
    )
    options.add_argument("--photos", type=user_path, required=True, help="Folder with 3 to 5 photos of the subject.")
    options.add_argument("--class_word", "--class-word", required=True, help="What the subject is one of: dog.")
    options.add_argument("--token", default=DEFAULT_TOKEN, help="The word that is to mean the subject.")
    options.add_argument("--prompt_template", default=DEFAULT_TEMPLATE, help="What each photo is said to show.")
    options.add_argument(
        "--captions",
        default="auto",
        choices=CAPTIONS,
        help="Captions of the photos. auto: photo.txt next to photo.jpg where there is one, else the "
        "template. files: one for every photo. template: --prompt_template for all.",
    )
    options.add_argument("--crop", default="center", choices=CROPS, help="How photos become square.")
    options.add_argument(
        "--num_class_images",
        type=int,
        default=0,
        help="Class images to make (or find again) for class preservation. 0: none.",
    )
    options.add_argument(
        "--class_guidance_scale",
        type=float,
        default=7.0,
        help="Classifier-free guidance of the class images. Low, 1 to 3, keeps the class closer to "
        "what the base draws.",
    )
    options.add_argument(
        "--clip_skip", type=int, choices=(1, 2), help="Text encoder layer, from the end; the family's own without it."
    )
    options.add_argument(
        "--prediction_type",
        choices=PREDICTION_TYPES,
        help="For a checkpoint that does not say it itself; epsilon without it.",
    )
    options.add_argument(
        "--output_dir",
        type=user_path,
        default=Path("subjectbooth_output"),
        help="Gets the LoRA, and the runs beside it.",
    )
    options.add_argument("--output_name", default="my_subject", help="Name of the LoRA file.")
    options.add_argument("--force_retrain", action="store_true", help="Train again from step 0.")
    options.add_argument(
        "--after_stop",
        default="keep",
        choices=("keep", "continue"),
        help="What becomes of a run that was stopped and kept: its adapter stays the result, or it is "
        "trained on to all steps.",
    )
    options.add_argument(
        "--keep",
        action="store_true",
        help="Take what the run has learned so far (after Ctrl+C, say) for its result: it ends at its next step.",
    )
    options.add_argument(
        "--report_to",
        default="none",
        choices=TRACKERS,
        help="Also show settings, curves and validation pictures in TensorBoard (files in the run's "
        "folder) or Weights & Biases (its servers get them, prompts included, unless "
        "WANDB_MODE=offline). Needs the package tensorboard, or wandb 0.19 or newer.",
    )
    options.add_argument(
        "--plan",
        action="store_true",
        help="Say what would be in memory and which settings would be chosen, and train nothing.",
    )
    options.add_argument("--cpu", action="store_true", help="Train on the CPU even when there is a GPU.")
    for setting in dataclasses.fields(TrainConfig):
        if setting.name == "validation_prompts":
            options.add_argument("--validation_prompts", nargs="*", default=[], help=setting.metadata["help"])
            continue
        if setting.name == "resolution":
            options.add_argument(
                "--resolution",
                type=int,
                help=f"{setting.metadata['help']} Without it, what the base was trained at: 512, 768 or 1024.",
            )
            continue
        if isinstance(setting.default, bool):
            options.add_argument(f"--{setting.name}", action="store_true", help=setting.metadata["help"])
            continue
        options.add_argument(
            f"--{setting.name}",
            type=type(setting.default),
            default=setting.default,
            choices=setting.metadata["choices"] or None,
            help=setting.metadata["help"].replace("%", "%%"),
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code. A user's mistake is one sentence on stderr; a signal keeps the steps so far."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Into a file or a pipe Windows writes in the system's code page, which has not every letter of a path.
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if given[:1] == ["clean"]:
        return clean(given[1:])
    options = parser().parse_args(given)
    try:
        with _signals_as_interrupts():
            _train(options)
    except SubjectBoothError as error:
        print(error_in_shell(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("stopped; the steps so far are kept, and the same command goes on from there", file=sys.stderr)
        return 128 + (error.number if isinstance(error, _Ended) else signal.SIGINT)
    return 0


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Inside, a signal that would end the program raises :class:`_Ended`, so that the steps so far are saved."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets nobody else handle signals
        return
    # nohup has SIGHUP ignored, and it stays so.
    before = {number: signal.getsignal(number) for number in _DEADLY if signal.getsignal(number) is not signal.SIG_IGN}

    def end(number: int, frame: FrameType | None) -> None:
        for other in before:  # a second one would end the saving; Ctrl+C still can
            signal.signal(other, signal.SIG_IGN)
        raise _Ended(number)

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    names = [setting.name for setting in dataclasses.fields(TrainConfig)]
    settings = {name: getattr(options, name) for name in names}
    if options.resolution is None:
        settings["resolution"] = FAMILIES[0].default_resolution[0]  # until the base says its own
    config = TrainConfig.from_json(settings)
    if not 1 <= options.class_guidance_scale <= 100:
        raise SubjectBoothError(
            f"class_guidance_scale {options.class_guidance_scale:g}",
            "a number from 1 to 100",
            "7 is usual, 1 draws without guidance",
            "class_guidance_scale",
        )
    if options.num_class_images < 0:
        raise SubjectBoothError(
            f"num_class_images {options.num_class_images}",
            "0 or more",
            "100 to 200 keep a class well, 0 makes none",
            "num_class_images",
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        # The step itself shares its batch between processes; who writes the run's files is not settled yet.
        raise SubjectBoothError(
            f"{processes} processes", "one", "use accelerate launch --num_processes 1", "accelerate launch"
        )
    checked_name(options.output_name)
    if options.resolution is None:
        config = dataclasses.replace(config, resolution=stored_resolution(options.base, options.prediction_type))
    subject = read_subject(options, config.resolution)
    for warning in subject.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if any(photo.caption != subject.instance_prompt for photo in subject.photos):
        print("\n".join(["captions:", *caption_lines(subject)]))
    if config.masked_loss:
        subject.check_masks(config.resolution, buckets=config.enable_bucket)  # before the base is read
    device = torch.device("cpu") if options.cpu else None
    base = load_base(options.base, options.clip_skip, options.prediction_type, device or default_device())
    if options.plan:
        print(_plan(options, config, subject, base, device))
        return
    priors = _class_priors(options, config, subject, base, device) if options.num_class_images else None
    run = Run(base, subject, keeping_class(priors), config, options.output_dir / "runs", device)
    finished: Finished | None = None
    if options.keep:
        run.stop_and_keep()
    # The bar's line ends before whatever is said next, an error too.
    with (
        tqdm(total=config.steps, unit="step", dynamic_ncols=True) as bar,
        closing(Tracker(options.report_to, run.folder, config, bar.write)) as tracker,
        closing(run.events(options.force_retrain, go_on=options.after_stop == "continue")) as events,
    ):
        for event in events:
            tracker.follow(event)
            if isinstance(event, Started):
                check_folder(options.output_dir, options.output_name)  # not before: what is found again is only read
                bar.update(event.step - bar.n)
                bar.write(
                    ", ".join(
                        [f"{name} {value}" for name, value in event.chosen.items()]
                        + [note_in_shell(note) for note in event.notes]
                    )
                )
                bar.write(event.plan)
            elif isinstance(event, StepDone):
                bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
                bar.update(event.step - bar.n)
            elif isinstance(event, Adjusted):
                bar.write(event.note)
            elif isinstance(event, Validation):
                bar.write(f"pictures of step {event.step} in {run.folder.path / 'validation'}")
            elif isinstance(event, Finished):
                finished = event
    assert finished is not None
    published = publish(finished.path, options.output_dir, options.output_name)
    if published.note:
        print(f"note: {published.note}", file=sys.stderr)
    done = "trained" if finished.trained else "found again, trained before"
    if finished.warning:
        print(f"warning: {finished.warning}", file=sys.stderr)
        done += ", but nothing was learned"
    if finished.step < config.steps:
        done += f" (stopped and kept at step {finished.step} of {config.steps})"
    print(f"{done}: {published.path} (write {subject.trigger!r} in prompts)")


def _plan(
    options: argparse.Namespace,
    config: TrainConfig,
    subject: Subject,
    base: BaseModel,
    device: torch.device | None,
) -> str:
    """The plan of the run that these options ask for; its class images need not be there yet."""
    size = base.denoiser.latent_size(config.resolution, config.resolution)
    priors = ClassPriors(torch.zeros(1, *size), subject.class_prompt, ("",), "") if options.num_class_images else None
    run = Run(base, subject, keeping_class(priors), config, options.output_dir / "runs", device)
    plan = run.plan()
    return "\n".join(filter(None, [plan.sentence, plan.warning, *map(note_in_shell, run.warnings)]))


def read_subject(options: argparse.Namespace, resolution: int) -> Subject:
    """The photos of a folder as a subject."""
    photos, notes = read_photos(list_photos(options.photos), options.captions)
    return make_subject(
        photos,
        class_word=options.class_word,
        token=options.token,
        resolution=resolution,
        crop=options.crop,
        prompt_template=options.prompt_template,
        tokenize=tokenize,
        notes=notes,
    )


def _class_priors(
    options: argparse.Namespace,
    config: TrainConfig,
    subject: Subject,
    base: BaseModel,
    device: torch.device | None,
) -> ClassPriors:
    from tqdm import tqdm

    def check() -> None:
        check_folder(options.output_dir, options.output_name)
        Run(base, subject, None, config, options.output_dir / "runs", device).check(subject.class_prompt)

    target = device or default_device()
    precision, _ = choose_precision(config, target)
    with tqdm(total=options.num_class_images, unit="class image") as bar:
        for made in generate(
            base,
            subject.class_prompt,
            options.num_class_images,
            config.resolution,
            options.output_dir / "class_images",
            target,
            check,
            precision=precision,
            guidance_scale=options.class_guidance_scale,
        ):
            if isinstance(made, ClassPriors):
                return made
            bar.update(made - bar.n)
    raise AssertionError("generate always ends with the class priors")


if __name__ == "__main__":
    sys.exit(main())
