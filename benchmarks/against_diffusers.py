"""Compare the trainer's speed and memory with diffusers' DreamBooth script on the same base; prints the ratios.

    python benchmarks/against_diffusers.py path/to/diffusers/examples/dreambooth/train_dreambooth_lora.py

Both use the same model folder (Stable Diffusion 1.5's layout with random weights, which do not affect time or memory),
photos, resolution, rank, optimizer and precision, and existing class images. diffusers runs with its fastest option,
``--pre_compute_text_embeddings``. The time per step is the difference between a run of STEPS + 1 steps and a run of one
step, divided by STEPS, which excludes start-up and shutdown. Linux only, because it reads each process's peak memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from full_size import GIB, PHOTOS, text_encoder, unet, vae
from setup_env import ROOT, ensure_environment

CLASS_IMAGES = 2
RANK = 16


@dataclass(frozen=True)
class Usage:
    """Wall time in seconds and peak memory in GiB of a command."""

    seconds: float
    memory: float


Trainer = Callable[[int, bool, Path], list[str]]
"""(steps, with class images, output folder) -> command."""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("rival", type=Path, help="diffusers' train_dreambooth_lora.py")
    options.add_argument("--resolution", type=int, default=256, help="pixels (default 256; 512 is usual, on a GPU)")
    options.add_argument("--steps", type=int, default=6, help="number of timed steps (default 6)")
    options.add_argument("--rounds", type=int, default=2, help="number of runs of each (default 2)")
    options.add_argument("--width", type=int, default=320, help="first UNet width, a multiple of 32 (SD 1.5: 320)")
    options.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    given = options.parse_args()
    if not given.rival.is_file():
        options.error(f"{given.rival} not found; use train_dreambooth_lora.py of a diffusers checkout")
    given.rival = given.rival.resolve()  # the commands run in this project's folder
    python = ensure_environment().python
    if Path(sys.executable).resolve() != Path(python).resolve():
        return subprocess.run([str(python), __file__, *sys.argv[1:]], check=False).returncode
    if given.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # diffusers' script has no option for it
    with tempfile.TemporaryDirectory(prefix="against_diffusers_") as scratch:
        compare(given, Path(scratch))
    return 0


def compare(given: argparse.Namespace, scratch: Path) -> None:
    """Run both alternately and print the results."""
    base = scratch / "base"
    write_base(base, given.width)
    fill_class_images(scratch / "class_pictures")
    trainers: dict[str, Trainer] = {
        "SubjectBooth": lambda steps, keep, folder: ours(given, base, steps, keep, folder),
        "diffusers": lambda steps, keep, folder: rival(given, base, scratch / "class_pictures", steps, keep, folder),
    }
    print(f"generating {CLASS_IMAGES} class images, which are then reused", flush=True)
    run(trainers["SubjectBooth"](1, True, scratch / "SubjectBooth-True"))
    step: dict[tuple[str, bool], list[float]] = {}
    whole: dict[tuple[str, bool], list[Usage]] = {}
    for number in range(given.rounds):
        for keep in (False, True):
            for name, command in trainers.items():
                folder = scratch / f"{name}-{keep}"
                one = run(command(1, keep, folder))
                many = run(command(given.steps + 1, keep, folder))
                step.setdefault((name, keep), []).append((many.seconds - one.seconds) / given.steps)
                whole.setdefault((name, keep), []).append(many)
                print(
                    f"round {number + 1}, {name}, {'with' if keep else 'without'} class images: "
                    f"{step[name, keep][-1]:.2f} s per step, {many.seconds:.0f} s in total, {many.memory:.1f} GiB",
                    flush=True,
                )
    report(
        {key: statistics.median(values) for key, values in step.items()},
        {key: statistics.median(usage.seconds for usage in values) for key, values in whole.items()},
        {key: max(usage.memory for usage in values) for key, values in whole.items()},
        given.steps + 1,
    )


def report(
    step: dict[tuple[str, bool], float],
    whole: dict[tuple[str, bool], float],
    memory: dict[tuple[str, bool], float],
    steps: int,
) -> None:
    """Print the ratios of the medians over the rounds (memory: of the maxima)."""
    if min(step.values()) <= 0:
        raise SystemExit("too few steps to measure: increase --steps or --resolution")
    for keep in (False, True):
        print(f"\n{'with' if keep else 'without'} class images: diffusers / SubjectBooth")
        for name, values in (("one step", step), (f"command of {steps} steps", whole), ("memory", memory)):
            print(f"  {name:24s} {values['diffusers', keep] / values['SubjectBooth', keep]:.2f}")
    print("\ncost of class images: one step with them / without them")
    for trainer in ("SubjectBooth", "diffusers"):
        print(f"  {trainer:24s} {step[trainer, True] / step[trainer, False]:.2f}")


def ours(given: argparse.Namespace, base: Path, steps: int, keep: bool, folder: Path) -> list[str]:
    class_images = ["--num_class_images", str(CLASS_IMAGES), "--class_guidance_scale", "1"] if keep else []
    return [
        sys.executable,
        "-m",
        "trainer",
        "--base",
        str(base),
        "--photos",
        str(PHOTOS),
        "--class-word",
        "cat",
        "--output_dir",
        str(folder),
        "--steps",
        str(steps),
        "--resolution",
        str(given.resolution),
        "--rank",
        str(RANK),
        "--network_alpha",
        str(RANK),
        "--precision",
        "fp32",
        "--gradient_checkpointing",
        "off",
        "--force_retrain",
        *(["--cpu"] if given.cpu else []),
        *class_images,
    ]


def rival(
    given: argparse.Namespace, base: Path, class_pictures: Path, steps: int, keep: bool, folder: Path
) -> list[str]:
    kept = (
        [
            "--with_prior_preservation",
            "--class_data_dir",
            str(class_pictures),
            "--class_prompt",
            "a photo of a cat",
            "--num_class_images",
            str(CLASS_IMAGES),
        ]
        if keep
        else []
    )
    return [
        sys.executable,
        str(given.rival),
        "--pretrained_model_name_or_path",
        str(base),
        "--instance_data_dir",
        str(PHOTOS),
        "--instance_prompt",
        "a photo of ohwx cat",
        "--output_dir",
        str(folder),
        "--max_train_steps",
        str(steps),
        "--resolution",
        str(given.resolution),
        "--rank",
        str(RANK),
        "--train_batch_size",
        "1",
        "--learning_rate",
        "1e-4",
        "--lr_scheduler",
        "constant",
        "--lr_warmup_steps",
        "0",
        "--mixed_precision",
        "no",
        "--checkpointing_steps",
        "100000",
        "--pre_compute_text_embeddings",
        "--seed",
        "0",
        *kept,
    ]


def run(command: list[str]) -> Usage:
    """Run a command and measure it; its output is shown if it fails."""
    began = time.monotonic()
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            raise SystemExit(output.read().decode("utf-8", "replace")[-4000:])
    return Usage(time.monotonic() - began, used.ru_maxrss * 1024 / GIB)


def write_base(folder: Path, width: int) -> None:
    """A pipeline of Stable Diffusion 1.5's layout as diffusers saves it, with random weights."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    whole = {
        "unet": unet("sd1", block_out_channels=(width, 2 * width, 4 * width, 4 * width)),
        "vae": vae(),
        "text_encoder": text_encoder("l"),
        "tokenizer": tokenizer(),
        "scheduler": scheduler,
    }
    StableDiffusionPipeline(
        **whole, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(folder)


def tokenizer() -> Any:
    """CLIP's tokenizer, from the merges that ship with the pack."""
    from transformers import CLIPTokenizerFast

    sys.path.insert(0, str(ROOT))  # to import the trainer
    from trainer.base.sd.tokenizer import clip_tokenizer

    return CLIPTokenizerFast(tokenizer_object=clip_tokenizer(), model_max_length=77)


def fill_class_images(folder: Path) -> None:
    """Class images for diffusers' script; any images will do."""
    folder.mkdir()
    photos = sorted(PHOTOS.glob("*.png"))
    for number in range(CLASS_IMAGES):
        shutil.copyfile(photos[number % len(photos)], folder / f"{number}.png")


if __name__ == "__main__":
    sys.exit(main())
