"""What a service needs: its arithmetic, and the table in the docs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from subjectbooth.scripts import service

ROOT = Path(__file__).resolve().parents[2]


def test_the_docs_have_the_scripts_table() -> None:
    text = (ROOT / "docs" / "service.md").read_text("utf-8")
    assert service.table(service.parser().parse_args([])) in text


def test_counts_are_those_of_the_memory_page() -> None:
    text = (ROOT / "docs" / "memory.md").read_text("utf-8")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    for model in service.MODELS.values():
        assert f"{model.tflop} TFLOP" in rows["matrix products per step"]
        assert f"{model.kernels:,}" in rows["kernels per step"]


@pytest.mark.parametrize(
    ("servers", "load", "mean"),
    # One server: the exact wait of M/D/1. Ten at a load of 8: Erlang C is 0.4092, as tables have it.
    [(1, 0.5, 0.5 / (2 * (1 - 0.5))), (10, 8.0, 0.4092 / (10 - 8) / 2), (3, 3.0, math.inf)],
)
def test_the_mean_wait_is_that_of_queueing_theory(servers: int, load: float, mean: float) -> None:
    assert service.mean_wait(load / 7, 7.0, servers) == pytest.approx(7 * mean, rel=1e-3)


def test_one_gpu_less_waits_longer_than_allowed() -> None:
    gpus = service.enough_servers(0.3, 47, 60)
    assert service.mean_wait(0.3, 47, gpus) <= 60 < service.mean_wait(0.3, 47, gpus - 1)


def test_a_measured_step_takes_the_place_of_the_counts() -> None:
    fixed = ["--steps", "100", "--seconds_per_step", "0.5", "--start_seconds", "10", "--losses_per_gpu_day", "0"]
    found = service.needs(service.MODELS["sd15"], service.parser().parse_args([*fixed, "--subjects", "3600"]))
    assert (found.seconds_per_subject, found.gpu_hours, found.gpus_on_average) == (60, 60, 2.5)
