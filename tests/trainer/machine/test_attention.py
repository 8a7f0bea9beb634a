"""Attention's kernel and TF32: what is chosen, what is used instead, and that all is set back. No GPU takes part."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from subjectbooth.tests.small_base import small_base, small_subject, small_unet
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import Started, StepDone
from subjectbooth.trainer.learn import assembly, gradients
from subjectbooth.trainer.learn.loss import Losses, batch_losses
from subjectbooth.trainer.machine import numerics
from subjectbooth.trainer.machine.attention import choose_attention, use_attention
from subjectbooth.trainer.machine.numerics import fp32_matmul_precision, has_tf32
from subjectbooth.trainer.runs.run import Run

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SETTINGS: dict[str, Any] = {"steps": 3, "learning_rate": 1e-3, "rank": 4, "network_alpha": 2.0, "resolution": 64}


@pytest.mark.parametrize(
    ("requested", "device", "installed", "expected", "said"),
    [
        ("auto", CPU, True, "sdpa", ""),
        ("auto", GPU, True, "sdpa", ""),
        ("sdpa", GPU, True, "sdpa", ""),
        ("xformers", GPU, True, "xformers", ""),
        ("xformers", CPU, True, "sdpa", "needs an NVIDIA GPU"),
        ("xformers", GPU, False, "sdpa", "not installed"),
    ],
)
def test_the_kernel_is_chosen_for_the_device(
    monkeypatch: pytest.MonkeyPatch, requested: str, device: torch.device, installed: bool, expected: str, said: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    chosen, note = choose_attention(requested, device)
    assert chosen == expected
    assert said in note and bool(note) == bool(said)


@pytest.mark.oldest
def test_xformers_that_does_not_work_is_said_and_sdpa_used() -> None:
    """Here it is not installed at all, which diffusers says when it is switched on."""
    unet = small_unet()
    assert use_attention(unet, "xformers")[0] == "sdpa"
    assert "cannot be used" in use_attention(unet, "xformers")[1]
    kinds = {type(processor).__name__ for processor in unet.attn_processors.values()}  # type: ignore[attr-defined]
    assert kinds == {"AttnProcessor2_0"}

    class Works:
        calls = 0

        def enable_xformers_memory_efficient_attention(self) -> None:
            self.calls += 1

    works = Works()
    assert use_attention(works, "xformers") == ("xformers", "")
    assert use_attention(works, "sdpa") == ("sdpa", "")
    assert works.calls == 1


def test_a_run_says_once_what_it_uses_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(**SETTINGS, attention="xformers")
    started = [
        event
        for event in Run(small_base(), small_subject(), None, config, tmp_path / "a", CPU).events()
        if isinstance(event, Started)
    ]
    assert started[0].chosen["attention"] == "sdpa"
    assert [note for note in started[0].notes if "xformers" in note] == [
        "attention xformers needs an NVIDIA GPU; this run uses sdpa"
    ]
    # As on a machine with a GPU and an xformers that was built for another torch.
    monkeypatch.setattr(assembly, "choose_attention", lambda requested, device: ("xformers", ""))
    started = [
        event
        for event in Run(small_base(), small_subject(), None, config, tmp_path / "b", CPU).events()
        if isinstance(event, Started)
    ]
    assert started[0].chosen["attention"] == "sdpa"
    assert len([note for note in started[0].notes if "xformers cannot be used" in note]) == 1
    assert config.key_fields() == TrainConfig(**SETTINGS).key_fields()


def _switches() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("end", ["finished", "cancelled", "failed"])
def test_tf32_is_on_while_a_step_is_made_and_never_for_others_however_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(numerics, "has_tf32", lambda device: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = _switches()
    assert before == ("highest", False)
    run = Run(small_base(), small_subject(), None, TrainConfig(**SETTINGS), tmp_path, CPU)
    events, during = run.events(), []

    def losses(*arguments: Any) -> Losses:
        during.append(_switches())
        return batch_losses(*arguments)

    monkeypatch.setattr(gradients, "batch_losses", losses)
    try:
        for event in events:
            assert _switches() == before
            if isinstance(event, StepDone):
                if end == "cancelled":
                    events.close()
                elif end == "failed":
                    events.throw(RuntimeError("made to fail by the test"))
    except RuntimeError as error:
        assert end == "failed" and "by the test" in str(error)
    assert during and set(during) == {("high", True)}
    assert _switches() == before


def test_tf32_is_left_alone_where_the_card_has_none_or_the_host_has_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _switches()
    with fp32_matmul_precision(CPU):
        assert _switches() == before
    torch.set_float32_matmul_precision("medium")  # on a CPU with bf16 products that is what they would be
    try:
        with fp32_matmul_precision(CPU):
            assert _switches() == ("highest", before[1])
        assert _switches() == ("medium", before[1])
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not has_tf32(CPU)
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert has_tf32(GPU) == expected
    with monkeypatch.context() as amd:  # whose capability counts otherwise
        amd.setattr(torch.version, "hip", "6.2")
        assert not has_tf32(GPU)
    set_to: list[str] = []

    def mixed() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    with fp32_matmul_precision(GPU):
        pass
    assert set_to == []
