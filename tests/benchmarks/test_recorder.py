"""What the benchmark measures inside a process: steps, counts, copies of weights, parts of a job."""

from __future__ import annotations

import json
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from subjectbooth.benchmarks.memory import copies_of, fingerprints, save_fingerprints
from subjectbooth.benchmarks.parts import Parts
from subjectbooth.benchmarks.recorder import Recorder
from subjectbooth.benchmarks.scene import Scene


@pytest.fixture
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(10)))


@pytest.fixture
def recorded(tmp_path: Path, network: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Two warm-up steps, three timed ones of 10 ms, and one that is counted."""
    scene = Scene(tmp_path, warm_up=2, timed=3)
    scene.base.mkdir()
    save_fingerprints(network.state_dict(), scene.base)
    recorder = Recorder(scene, tmp_path / "out.json", True, time.monotonic())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, foreach=True)  # reads its number of steps, on the host
    try:
        with recorder.parts.part("base"):
            time.sleep(0.05)
        for _ in range(6):
            # As in ComfyUI and in our loop: each step in a block of its own, within which the counting begins and ends.
            with torch.inference_mode(False):
                time.sleep(0.01)
                loss = network(torch.ones(2, 8)).half().float().sum()
                loss.item()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:  # or its hook would see the optimizers of other tests
        recorder.close()
    yield json.loads((tmp_path / "out.json").read_text("utf-8"))


def test_the_timed_steps_and_no_others_are_stamped(recorded: dict[str, Any]) -> None:
    assert len(recorded["wall"]) == len(recorded["cpu"]) == 3
    assert all(0.01 <= seconds for seconds in recorded["wall"])
    assert all(seconds < wall for seconds, wall in zip(recorded["cpu"], recorded["wall"], strict=True))
    assert recorded["first_step"] < recorded["last_step"]
    assert 0.05 <= recorded["parts"]["base"] < recorded["first_step"]


def test_one_whole_step_is_counted(recorded: dict[str, Any]) -> None:
    counts = recorded["counts"]
    assert counts["flop"] == 10 * 2 * (2 * 8 * 8) + (10 + 9) * 2 * (
        2 * 8 * 8
    )  # the first layer's input has no gradient
    assert (counts["syncs"], counts["casts"]) == (1, 4)  # to half and back, and the same backward
    assert recorded["copies"] == 1


def test_a_copy_of_the_weights_is_seen_in_any_dtype(network: torch.nn.Module) -> None:
    known = fingerprints(network.state_dict())
    assert copies_of(known) == 1
    shared = [weight.detach() for weight in network.parameters()]
    assert copies_of(known) == 1
    copied = [weight.to(torch.bfloat16) for weight in shared]
    assert copies_of(known) == 2
    half = [weight.clone() for weight in shared[:5]]
    assert copies_of(known) == 2.5
    del copied, half, shared
    assert copies_of(known) == 1


def test_a_part_inside_another_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    parts = Parts()

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    source, user = types.ModuleType("a_pack.nodes.source"), types.ModuleType("a_pack.user")
    source.hash_all = user.hash_all = lambda: pass_time(3)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_pack.nodes.source", source)
    monkeypatch.setitem(sys.modules, "a_pack.user", user)
    parts.measure_everywhere("nodes.source", ("hash_all", "not_there", "Nor.this"), "hashing")
    with parts.part("base"):
        pass_time(1)
        user.hash_all()
        aside = threading.Thread(target=user.hash_all)  # at the same time, as far as this thread is concerned
        aside.start()
        aside.join()
        now[0] -= 3
        pass_time(1)
    pass_time(10)
    assert parts.seconds == {"base": 2, "hashing": 3}
    parts.stop()
    user.hash_all()
    assert parts.seconds == {"base": 2, "hashing": 3}
