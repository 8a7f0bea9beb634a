"""fp16's loss scaling, on a CPU: torch's own scaler in accelerate's place for it, with everything else as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from subjectbooth.tests.small_base import small_base, small_class_images, small_subject
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import StepDone
from subjectbooth.trainer.machine.runtime import accelerate_precision, choose_precision
from subjectbooth.trainer.runs.run import Run

CPU = torch.device("cpu")
START = 1024.0
SETTINGS: dict[str, Any] = {
    "steps": 4,
    "learning_rate": 1e-3,
    "rank": 4,
    "network_alpha": 2.0,
    "resolution": 64,
    "max_grad_norm": 0.05,
    "gradient_accumulation_steps": 2,
}


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The accelerators that runs make from now on; each scales losses as with fp16 on a GPU. `overflow_at` of an
    accelerator's class makes one backward pass overflow."""
    import accelerate

    made: list[Any] = []

    class Scaled(accelerate.Accelerator):
        overflow_at = 0
        backwards = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=START)
            made.append(self)

        def prepare(self, *args: Any, **kwargs: Any) -> Any:
            prepared = super().prepare(*args, **kwargs)
            self.native_amp = True  # from here on; before, it would also put an autocast around the model
            return prepared

        @property
        def mixed_precision(self) -> str:
            return "fp16" if getattr(self, "native_amp", False) else super().mixed_precision

        def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
            type(self).backwards += 1
            super().backward(loss * float("inf") if self.backwards == self.overflow_at else loss, **kwargs)

    monkeypatch.setattr(accelerate, "Accelerator", Scaled)
    return made


def _run(root: Path, stop: int = 0) -> tuple[list[float], dict[str, torch.Tensor]]:
    run = Run(small_base(), small_subject(), small_class_images(), TrainConfig(**SETTINGS), root, CPU)
    losses, events = [], run.events()
    for event in events:
        if isinstance(event, StepDone):
            losses.append(event.loss)
            if event.step == stop:
                events.close()
                return losses, {}
    path = run.folder.finished_lora(4)
    assert path is not None
    import safetensors.torch

    return losses, safetensors.torch.load_file(path)


def test_it_is_chosen_for_cards_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for supported, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, found=supported: found)
        assert choose_precision(TrainConfig(), gpu)[0] == expected
        assert choose_precision(TrainConfig(precision="fp16"), gpu)[0] == "fp16"
    assert choose_precision(TrainConfig(), CPU)[0] == "fp32"
    precision, notes = choose_precision(TrainConfig(precision="fp16"), CPU)
    assert precision == "fp32" and "needs a GPU" in notes[0]
    assert [accelerate_precision(name) for name in ("fp32", "fp16", "bf16")] == ["no", "fp16", "no"]


def test_scaled_losses_train_the_same(tmp_path: Path, scaled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a power of two nothing is rounded; the clipping has to see the gradients as they are."""
    losses, lora = _run(tmp_path / "scaled")
    assert scaled[0].scaler.get_scale() == START
    monkeypatch.undo()
    plain_losses, plain = _run(tmp_path / "plain")
    assert losses == pytest.approx(plain_losses, rel=1e-6)
    for name in plain:
        torch.testing.assert_close(lora[name], plain[name], atol=1e-7, rtol=1e-4)


def test_a_step_that_overflows_is_left_out_and_the_scale_kept_for_a_resume(tmp_path: Path, scaled: list[Any]) -> None:
    import accelerate

    accelerate.Accelerator.overflow_at = 3  # the second step's first micro-step
    _run(tmp_path, stop=2)
    assert scaled[0].scaler.get_scale() == START / 2
    _, lora = _run(tmp_path)
    assert scaled[1].scaler.get_scale() == START / 2  # as it was saved, not as it starts
    assert all(bool(torch.isfinite(tensor).all()) for tensor in lora.values())
    assert any(float(tensor.abs().max()) > 0 for name, tensor in lora.items() if "lora_up" in name)
