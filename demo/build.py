"""From the raw packages to the weights: `python -m demo.build STAGE`. Each stage goes on where it was stopped.

In order: words, autoencoder, wide, encoder, diffusion, rare, pack; then subjects and judge. To train packed weights
further: unpack, diffusion, rare, pack.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from .base import WEIGHTS
from .classes import all_words
from .judge import train_judge
from .pack import pack, unpack
from .subjects import write_subjects
from .train_autoencoder import AutoencoderRun, train_autoencoder
from .train_diffusion import DiffusionRun, train_diffusion
from .words import TABLE, write_table

STAGES = ("words", "autoencoder", "wide", "encoder", "diffusion", "rare", "pack", "unpack", "subjects", "judge")
WORK = Path(__file__).parent / ".work"

AUTOENCODER = AutoencoderRun()
WIDE = AutoencoderRun(
    name="wide",
    start_from=AUTOENCODER.name,
    keep_latents=0.002,
    perceptual=0.01,
    any_drawing=0.7,
    encoder_widths=(32, 64, 64, 64),
    decoder_widths=(24, 48, 64, 64),
    lr=1e-3,
    seed=1,
)
ENCODER = replace(
    WIDE, name="encoder", start_from=WIDE.name, encoder_only=True, keep_latents=0.0, perceptual=0.0, lr=7e-4, seed=2
)
AUTOENCODERS = (AUTOENCODER, WIDE, ENCODER)
"""Each goes on from the one before."""
DIFFUSION = DiffusionRun()
RARE = DiffusionRun(
    name="rare",
    start_from=DIFFUSION.name,
    rare_share=0.25,
    any_drawing=0.4,
    snr_cap=20.0,
    steps=4000,
    warmup=100,
    ema_decay=0.998,
    seed=2,
)


def main() -> None:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m demo.build", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--minutes", type=float, help="end the schedule after this time instead of by steps")
    parser.add_argument("--lr", type=float, help="highest learning rate, if not the stage's own")
    parser.add_argument("--workers", type=int, default=2, help="training processes, one core each")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for packages and training states")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="packed weights, for `unpack`")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of CLIP's vocab.json and merges.txt, for `words`"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.stage == "words":
        if arguments.tokenizer is None:
            parser.error("the stage `words` needs --tokenizer")
        write_table(arguments.tokenizer / "vocab.json", arguments.tokenizer / "merges.txt", all_words())
        return
    if not TABLE.exists():
        parser.error("run the stage `words` first")
    if arguments.stage == "subjects":
        write_subjects(arguments.work)
    if arguments.stage == "judge":
        train_judge(arguments.work)
    latest = [run for run in AUTOENCODERS if (arguments.work / f"{run.name}.pt").exists()]
    autoencoder = latest[-1] if latest else AUTOENCODER
    diffusion = RARE if (arguments.work / f"{RARE.name}.pt").exists() else DIFFUSION
    if arguments.stage == "pack":
        pack(arguments.work, diffusion.name, autoencoder.name)
    if arguments.stage == "unpack":
        unpack(arguments.work, DIFFUSION.name, WIDE.name, [ENCODER.name, RARE.name], arguments.weights)
    if arguments.stage in ("diffusion", "rare"):
        asked = DIFFUSION if arguments.stage == "diffusion" else RARE
        run = replace(
            asked,
            autoencoder=autoencoder.name,
            minutes=arguments.minutes,
            workers=arguments.workers,
            lr=arguments.lr or asked.lr,
        )
        train_diffusion(run, arguments.work)
    for which in AUTOENCODERS:
        if arguments.stage == which.name:
            train_autoencoder(
                replace(which, minutes=arguments.minutes, workers=arguments.workers), arguments.work
            )


if __name__ == "__main__":
    main()
