"""What a service that trains a LoRA for each of many subjects a day needs: GPUs, queue and storage, as a table.

    python scripts/service.py                                  SD 1.5 and SDXL, as in docs/service.md
    python scripts/service.py --model sd15 --seconds_per_step 0.06 --subjects 2000

Work, sizes and kernels are this project's own counts; what a GPU does of them in a second is an assumption until
`python -m trainer speed` has measured it on yours.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

HOUR, DAY = 3600.0, 86400.0


@dataclass(frozen=True)
class Model:
    """What is known about a step, counted without a GPU.

    Attributes:
        title: for the table's head.
        tflop: matrix products of a step for one picture, in TFLOP (docs/memory.md, "Without a GPU").
        kernels: of such a step, each of which the host has to launch (same table).
        parameters: of a LoRA of rank 16 on all attention layers of the UNet.
    """

    title: str
    tflop: float
    kernels: int
    parameters: int


MODELS = {
    "sd15": Model("SD 1.5, 512 px, bf16", 1.79, 4280, 3_188_736),
    "sdxl": Model("SDXL, 1024 px, fp16, checkpointing", 19.73, 21_230, 23_224_320),
}
FLOAT32 = 4
"""Bytes: LoRAs and optimizer states are stored in float32."""


@dataclass(frozen=True)
class Needs:
    """What the service needs."""

    seconds_per_step: float
    seconds_per_subject: float
    gpu_hours: float
    gpus_on_average: float
    gpus: int
    wait: float
    lora_mb: float
    loras_tb_a_year: float
    runs_gb: float
    mb_per_second: float


def needs(model: Model, given: argparse.Namespace) -> Needs:
    """The needs of a service.

    Args:
        given: the options.
    """
    pictures = given.pictures
    step = given.seconds_per_step or max(
        pictures * model.tflop / given.tflops, model.kernels * given.launch_microseconds / 1e6
    )
    # A lost GPU costs its subject a new start and, on average, half of what is trained between two checkpoints.
    subject = given.start_seconds + given.steps * step
    lost = given.losses_per_gpu_day / DAY * subject * (given.start_seconds + given.checkpoint_seconds / 2)
    subject += lost
    hours = given.subjects * subject / HOUR
    arrivals = given.subjects * given.busiest_hour / DAY
    gpus = enough_servers(arrivals, subject, given.wait_minutes * 60)
    lora = model.parameters * FLOAT32
    run = lora + 3 * lora + given.other_mb * 1e6  # checkpoint: adapter and AdamW's two states
    return Needs(
        seconds_per_step=step,
        seconds_per_subject=subject,
        gpu_hours=hours,
        gpus_on_average=hours / 24,
        gpus=gpus,
        wait=mean_wait(arrivals, subject, gpus),
        lora_mb=lora / 1e6,
        loras_tb_a_year=given.subjects * 365 * lora / 1e12,
        runs_gb=given.subjects * given.days_kept * run / 1e9,
        # The LoRA is written twice, in its run and where it is published; checkpoints as often as they are due.
        mb_per_second=arrivals * (2 * lora + max(1.0, subject / given.checkpoint_seconds) * 3 * lora) / 1e6,
    )


def mean_wait(arrivals: float, service: float, servers: int) -> float:
    """The mean seconds in the queue before training starts; infinite if the queue grows without end.

    Erlang's C formula for random arrivals, halved, because trainings of one kind all take about the same time (the
    usual approximation for M/D/c: Allen and Cunneen).

    Args:
        arrivals: a second.
        service: seconds.
    """
    load = arrivals * service
    if servers <= load:
        return math.inf
    # Erlang's B by its recurrence, which does not overflow; C follows from it.
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = load * blocked / (number + load * blocked)
    waits = blocked / (1 - load / servers * (1 - blocked))
    return waits * service / (servers - load) / 2


def enough_servers(arrivals: float, service: float, wait: float) -> int:
    """The fewest servers with which the mean wait is at most ``wait`` seconds."""
    servers = int(arrivals * service) + 1
    while mean_wait(arrivals, service, servers) > wait:
        servers += 1
    return servers


def table(given: argparse.Namespace) -> str:
    """The needs of each model, in Markdown."""
    names = [given.model] if given.model else list(MODELS)
    found = [needs(MODELS[name], given) for name in names]
    rows = [
        ("seconds a step", lambda n: f"{n.seconds_per_step:.3f}"),
        ("GPU seconds a subject", lambda n: f"{n.seconds_per_subject:.0f}"),
        ("GPU hours a day", lambda n: f"{n.gpu_hours:,.0f}"),
        ("GPUs if work came evenly", lambda n: f"{n.gpus_on_average:.1f}"),
        ("GPUs for the busiest hour", lambda n: f"{n.gpus}"),
        ("mean wait then, seconds", lambda n: f"{n.wait:.0f}"),
        ("a LoRA, MB", lambda n: f"{n.lora_mb:.1f}"),
        ("LoRAs of a year, TB", lambda n: f"{n.loras_tb_a_year:.1f}"),
        (f"runs of {given.days_kept:g} days, GB", lambda n: f"{n.runs_gb:,.0f}"),
        ("written in the busiest hour, MB/s", lambda n: f"{n.mb_per_second:.1f}"),
    ]
    head = ["", *(MODELS[name].title for name in names)]
    lines = [head, ["---"] * len(head), *([label, *(show(n) for n in found)] for label, show in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("|  |", "| |")


def parser() -> argparse.ArgumentParser:
    """The options; each says where its default comes from."""
    parsed = argparse.ArgumentParser(
        description="What a service that trains a LoRA for each of many subjects a day needs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parsed.add_argument
    add("--model", choices=tuple(MODELS), help="Only this one.")
    add("--subjects", type=float, default=10_000, help="A day.")
    add("--steps", type=float, default=500, help="Of a training; the trainer's default.")
    add("--pictures", type=float, default=1, help="In a step: photos and class images.")
    add("--seconds_per_step", type=float, default=0, help="Measured by python -m trainer speed; 0: from the counts.")
    add(
        "--tflops",
        type=float,
        default=100,
        help="TFLOP a second in half precision. Assumed: a third of an A100's peak.",
    )
    add("--launch_microseconds", type=float, default=8, help="To launch a kernel. Assumed: usual for PyTorch.")
    add("--start_seconds", type=float, default=30, help="To start, read the base, encode photos, and save. Assumed.")
    add("--busiest_hour", type=float, default=2.5, help="Subjects in the busiest hour, by the mean hour. Assumed.")
    add("--wait_minutes", type=float, default=1, help="Mean wait in the busiest hour. A choice.")
    add("--losses_per_gpu_day", type=float, default=1, help="How often a GPU is lost. Assumed: cheap machines.")
    add("--checkpoint_seconds", type=float, default=60, help="Between checkpoints; the trainer's default.")
    add("--other_mb", type=float, default=10, help="Photos, log and validation images of a run. Assumed.")
    add("--days_kept", type=float, default=7, help="How long runs are kept, to train on or repeat. A choice.")
    return parsed


def main() -> int:
    print(table(parser().parse_args()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
