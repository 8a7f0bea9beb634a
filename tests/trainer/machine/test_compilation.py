"""torch.compile: only in steps, with the same result, and never the end of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from subjectbooth.tests.small_base import small_base, small_subject
from subjectbooth.trainer.base.sd.denoiser import DiffusersUNet
from subjectbooth.trainer.config import TrainConfig, run_key
from subjectbooth.trainer.events import Adjusted, Started, StepDone, Validation
from subjectbooth.trainer.machine import compilation
from subjectbooth.trainer.machine.compilation import choose_compile
from subjectbooth.trainer.runs.run import Run

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    steps=2,
    learning_rate=1e-3,
    rank=4,
    network_alpha=4.0,
    resolution=64,
    precision="bf16",  # with the copies of the LoRA's weights
    gradient_checkpointing="on",  # blocks run again in the backward pass
    validation_prompts=("{subject}",),
    validation_interval=1,
    validation_steps=1,
)


def _events(root: Path, compiled: str) -> list[Any]:
    config = dataclasses.replace(CONFIG, compile=compiled)
    return list(Run(small_base(), small_subject(), None, config, root, CPU).events())


def _only(events: list[Any], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was compiled: by dynamo alone, which takes no C++ compiler and little time."""
    found: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    def two_blocks(self: DiffusersUNet, network: Any) -> list[Any]:
        """One of each kind, as tracing takes a second each."""
        return list({type(block): block for block in all_blocks(self, network)}.values())

    all_blocks = DiffusersUNet.blocks
    monkeypatch.setattr(DiffusersUNet, "blocks", two_blocks)
    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "BACKEND", backend)
    return found


def test_a_compiled_run_learns_the_same_and_compiles_nothing_between_steps(tmp_path: Path, frames: list[Any]) -> None:
    plain = _events(tmp_path / "plain", "off")
    assert not frames
    run = Run(small_base(), small_subject(), None, dataclasses.replace(CONFIG, compile="on"), tmp_path / "on", CPU)
    compiled, counts = [], []
    for event in run.events():
        compiled.append(event)
        counts.append((type(event), len(frames)))
    assert _only(compiled, Started)[0].chosen["compile"] == "on"
    after_first = next(count for kind, count in counts if kind is StepDone)
    assert 0 < after_first == counts[-1][1]  # neither the second step nor a validation image needs another
    for step, other in zip(_only(plain, StepDone), _only(compiled, StepDone), strict=True):
        assert other.loss == pytest.approx(step.loss, rel=1e-2)
        assert other.grad_norm == pytest.approx(step.grad_norm, rel=0.1)
    assert len(_only(compiled, Validation)) == 2


def test_a_compiler_that_fails_is_reported_once_and_the_run_goes_on(
    tmp_path: Path, frames: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _events(tmp_path / "plain", "off")

    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler was found\nand more")

    monkeypatch.setattr(compilation, "BACKEND", fails)
    events = _events(tmp_path / "on", "on")
    (note,) = _only(events, Adjusted)
    assert note.step == 0 and note.chosen["compile"] == "off"
    assert note.note.startswith("torch.compile cannot be used here (") and "this run does not compile" in note.note
    assert "no C++ compiler was found" in note.note and "and more" not in note.note
    assert [step.loss for step in _only(events, StepDone)] == [step.loss for step in _only(plain, StepDone)]


def test_other_errors_of_a_compiled_step_still_end_the_run(
    tmp_path: Path, frames: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, *_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("subjectbooth.trainer.learn.gradients.Gradients._draw", fails)
    with pytest.raises(ZeroDivisionError):
        _events(tmp_path, "on")


def test_auto_compiles_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, of_sdxl, of_sd = torch.device("cuda"), 1024**2, 512**2
    monkeypatch.setattr(compilation, "_is_supported", lambda: True)
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: name)
    assert choose_compile("auto", gpu, 2000, 1, of_sdxl) == (True, "")
    assert choose_compile("auto", gpu, 1999, 1, of_sdxl) == (False, "")
    assert choose_compile("auto", gpu, 2000, 1, of_sd) == (False, "")
    assert choose_compile("auto", gpu, 2000, 4, of_sd) == (True, "")
    assert choose_compile("auto", CPU, 10**6, 4, of_sdxl) == (False, "")
    assert choose_compile("on", CPU, 1, 1, of_sd) == (True, "")
    assert choose_compile("off", gpu, 10**6, 4, of_sdxl) == (False, "")
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)  # no Triton, as on Windows
    assert choose_compile("auto", gpu, 2000, 1, of_sdxl) == (False, "")
    monkeypatch.setattr(compilation, "_is_supported", lambda: False)
    assert choose_compile("auto", gpu, 2000, 1, of_sdxl) == (False, "")
    on, note = choose_compile("on", gpu, 2000, 1, of_sdxl)
    assert not on and "not available" in note


def test_a_model_without_known_blocks_says_that_it_is_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffusersUNet, "blocks", lambda self, network: [])
    events = Run(small_base(), small_subject(), None, dataclasses.replace(CONFIG, compile="on"), tmp_path, CPU).events()
    started = next(events)
    events.close()
    assert isinstance(started, Started) and started.chosen["compile"] == "off"
    assert sum("cannot be compiled" in note for note in started.notes) == 1


def test_a_run_is_found_again_whether_compiled_or_not() -> None:
    keys = {run_key(dataclasses.replace(CONFIG, compile=way), "photos", "base", None) for way in ("auto", "on", "off")}
    assert len(keys) == 1
