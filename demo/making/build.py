"""Build the weights from the raw packages: `python -m demo.making.build all`. Interrupted stages resume.

`all` runs every other stage except unpack, in order, and skips finished ones; about ten hours on two cores.
To train packed weights further: unpack, last, pack (and encoder, for the autoencoder).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..base import WEIGHTS
from .classes import MORE_STYLES, all_words
from .judge import train_judge
from .pack import pack, unpack
from .parallel import share_done
from .subjects import write_subjects
from .train_autoencoder import AutoencoderRun, train_autoencoder
from .train_diffusion import DiffusionRun, train_diffusion
from .words import TABLE, write_table

WORK = Path(__file__).resolve().parent.parent / ".work"
logger = logging.getLogger("subjectbooth")

AUTOENCODER = AutoencoderRun()
WIDE = AutoencoderRun(
    name="wide",
    start_from=AUTOENCODER.name,
    keep_latents=0.002,
    perceptual=0.01,
    any_drawing=0.7,
    encoder_widths=(32, 64, 64, 64),
    decoder_widths=(24, 48, 64, 64),
    steps=4400,
    lr=1e-3,
    seed=1,
)
ENCODER = replace(
    WIDE,
    name="encoder",
    start_from=WIDE.name,
    encoder_only=True,
    keep_latents=0.0,
    perceptual=0.0,
    steps=1200,
    lr=7e-4,
    seed=2,
)
AUTOENCODERS = (AUTOENCODER, WIDE, ENCODER)
"""Each continues from the previous one."""
DIFFUSION = DiffusionRun()
RARE = DiffusionRun(
    name="rare",
    start_from=DIFFUSION.name,
    rare_share=0.25,
    any_drawing=0.4,
    snr_cap=20.0,
    steps=2500,
    lr=1.2e-3,
    warmup=100,
    ema_decay=0.998,
    seed=2,
)
VARIED = replace(RARE, name="varied", start_from=RARE.name, varied_classes=True)
MORE_SETS = replace(VARIED, name="more_sets", start_from=VARIED.name, styles=MORE_STYLES, steps=3100)
LAST = replace(MORE_SETS, name="last", start_from=MORE_SETS.name, any_drawing=0.3, steps=6000)
DIFFUSIONS = (DIFFUSION, RARE, VARIED, MORE_SETS, LAST)
"""Each continues from the previous one."""

RUNS: dict[str, AutoencoderRun | DiffusionRun] = {run.name: run for run in (*AUTOENCODERS, *DIFFUSIONS)}
ALL = ("words", *RUNS, "pack", "subjects", "judge")
STAGES = ("all", *ALL, "unpack")


def main() -> None:
    """Run the requested stages."""
    parser = argparse.ArgumentParser(prog="python -m demo.making.build", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--minutes", type=float, help="end the schedule after this time instead of a number of steps")
    parser.add_argument("--lr", type=float, help="peak learning rate; default: the stage's")
    parser.add_argument("--workers", type=int, default=2, help="number of training processes, one core each")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for packages and training states")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="packed weights, for `unpack`")
    parser.add_argument("--tokenizer", type=Path, help="folder with CLIP's vocab.json and merges.txt, for `words`")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.stage in ("all", "words") and arguments.tokenizer is None:
        parser.error("the stage `words` needs --tokenizer")
    if arguments.stage not in ("all", "words") and not TABLE.exists():
        parser.error("run the stage `words` first")
    for stage in ALL if arguments.stage == "all" else [arguments.stage]:
        run = _run_of(stage, arguments) if stage in RUNS else None
        if run and arguments.stage == "all" and finished(arguments.work, run):
            logger.info("%s is finished", stage)
        elif isinstance(run, DiffusionRun):
            train_diffusion(run, arguments.work)
        elif run:
            train_autoencoder(run, arguments.work)
        else:
            _do(stage, arguments)


def finished(work: Path, run: AutoencoderRun | DiffusionRun) -> bool:
    """Whether *run* has a training state in *work* at the end of its schedule."""
    path = work / f"{run.name}.pt"
    if not path.exists():
        return False
    state = torch.load(path, weights_only=True)
    return share_done(state["step"], state["spent"], run.steps, run.minutes) >= 1


def _latest(runs: Sequence[AutoencoderRun | DiffusionRun], work: Path) -> str:
    """Name of the last of *runs* with a saved state, or of the first if there is none."""
    saved = [run.name for run in runs if (work / f"{run.name}.pt").exists()]
    return saved[-1] if saved else runs[0].name


def _run_of(stage: str, arguments: argparse.Namespace) -> AutoencoderRun | DiffusionRun:
    run = replace(RUNS[stage], minutes=arguments.minutes, workers=arguments.workers)
    if not isinstance(run, DiffusionRun):
        return run
    return replace(run, autoencoder=_latest(AUTOENCODERS, arguments.work), lr=arguments.lr or run.lr)


def _do(stage: str, arguments: argparse.Namespace) -> None:
    """Run a stage that is not one of RUNS."""
    work: Path = arguments.work
    if stage == "words":
        write_table(arguments.tokenizer / "vocab.json", arguments.tokenizer / "merges.txt", all_words())
    elif stage == "subjects":
        write_subjects(work)
    elif stage == "judge":
        train_judge(work)
    elif stage == "pack":
        pack(work, _latest(DIFFUSIONS, work), _latest(AUTOENCODERS, work))
    elif stage == "unpack":
        unpack(work, MORE_SETS.name, WIDE.name, [ENCODER.name, LAST.name], arguments.weights)


if __name__ == "__main__":
    main()
