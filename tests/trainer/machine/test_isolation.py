"""What others leave behind in the process decides nothing of a run, and it changes nothing of theirs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from subjectbooth.tests.small_base import (
    small_base,
    small_class_images,
    small_subject,
    with_network,
    with_text_encoders,
)
from subjectbooth.trainer.base.base_model import BaseModel
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import StepDone, Validation
from subjectbooth.trainer.machine.numerics import default_numerics, seeded
from subjectbooth.trainer.runs.run import Run

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "steps": 2,
    "learning_rate": 1e-3,
    "rank": 4,
    "network_alpha": 2.0,
    "resolution": 64,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.1,
    "train_text_encoder": True,
    "ema_decay": 0.5,
    "validation_prompts": ("a photo of {subject}",),
    "validation_steps": 2,
    "pictures_per_forward": 1,
}
Outcome = tuple[str, bytes, torch.Tensor]


def _train(
    root: Path,
    on_step: Callable[[], None] = lambda: None,
    precision: str = "fp32",
    left_on: Callable[[], AbstractContextManager[Any]] = nullcontext,
    base: BaseModel | None = None,
) -> Outcome:
    """Key, file and picture of a run, from preparing the photos on."""
    config = TrainConfig(**SETTINGS, precision=precision)
    given = base or small_base(), small_subject(), small_class_images()
    with left_on():
        return _outcome(Run(*given, config, root, CPU), on_step)


def _outcome(run: Run, on_step: Callable[[], None]) -> Outcome:
    pictures = None
    for event in run.events():
        if isinstance(event, StepDone):
            on_step()
        if isinstance(event, Validation):
            pictures = event.images
    path = run.folder.finished_lora(2)
    assert path is not None and pictures is not None
    # The header has times in it; the tensors come after it.
    content = path.read_bytes()
    return run.folder.key, content[8 + int.from_bytes(content[:8], "little") :], pictures


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return {
        precision: _train(tmp_path_factory.mktemp(precision), precision=precision) for precision in ("fp32", "bf16")
    }


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def _autocast_switched_on() -> Iterator[None]:
    torch.set_autocast_enabled("cpu", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", False)
        torch.clear_autocast_cache()


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _all_of(*switches: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for switch in switches:
            stack.enter_context(switch)
        yield


LEFT_ON: dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {
    "a float64 default and a default device": (
        "fp32",
        lambda: _all_of(_default_dtype(torch.float64), torch.device("meta"), torch.no_grad(), _deterministic()),
    ),
    "a bfloat16 default and autocast": (
        "fp32",
        lambda: _all_of(_default_dtype(torch.bfloat16), torch.inference_mode(), _autocast_switched_on()),
    ),
    "autocast around one's own": ("bf16", lambda: torch.autocast("cpu", torch.bfloat16)),
}


def _switches() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.empty(0).device.type,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


@pytest.mark.parametrize("left_on", LEFT_ON)
def test_torchs_switches_decide_nothing_and_stay_as_they_are(
    tmp_path: Path, undisturbed: dict[str, Outcome], left_on: str
) -> None:
    precision, enter = LEFT_ON[left_on]
    seen: list[tuple[Any, ...]] = []
    key, file, pictures = _train(tmp_path, lambda: seen.append(_switches()), precision, enter)
    with enter():
        assert seen == [_switches()] * 2
    expected = undisturbed[precision]
    assert key == expected[0]
    assert file == expected[1]
    assert torch.equal(pictures, expected[2])


def test_accelerates_settings_in_the_environment_decide_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Outcome]
) -> None:
    for name, value in {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_MIXED_PRECISION": "fp8",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_USE_MEGATRON_LM": "true",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
        "ACCELERATE_TORCH_DEVICE": "meta",
        "ACCELERATE_CPU_AFFINITY": "1",
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_PORT": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    environment = dict(os.environ)
    assert _train(tmp_path)[:2] == undisturbed["fp32"][:2]
    assert dict(os.environ) == environment


def test_what_others_have_and_change_meanwhile_is_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Outcome]
) -> None:
    """An Accelerator of another pack in another thread, from before the run and from within it."""
    monkeypatch.delenv("SUBJECTBOOTH_TEST_OTHER", raising=False)
    kinds = (PartialState, AcceleratorState, GradientState)
    assert not any(kind._shared_state for kind in kinds)
    steps: list[Any] = []

    def other() -> None:
        if not steps:
            os.environ["SUBJECTBOOTH_TEST_OTHER"] = "set while the run goes on"
            steps.append(Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3))
        else:
            assert steps[0].mixed_precision == "bf16" and steps[0].gradient_accumulation_steps == 3
            steps[0].gradient_state._set_sync_gradients(False)  # the run's own optimizer makes its steps all the same

    def from_another_thread() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    try:
        outcome = _train(tmp_path / "first", from_another_thread)
        assert outcome[:2] == undisturbed["fp32"][:2]
        # And a second run, with all of that there from its start.
        assert _train(tmp_path / "second")[:2] == undisturbed["fp32"][:2]
        assert os.environ.get("SUBJECTBOOTH_TEST_OTHER") == "set while the run goes on"
        assert AcceleratorState._shared_state is steps[0].state.__dict__
        assert steps[0].mixed_precision == "bf16" and steps[0].gradient_accumulation_steps == 3
        assert steps[0].sync_gradients is False
    finally:
        os.environ.pop("SUBJECTBOOTH_TEST_OTHER", None)
        for kind in kinds:
            kind._shared_state.clear()


def test_no_gpu_is_reseeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed seeds every GPU there is, whatever fork_rng is told to put back."""
    base, seeds = small_base(), []
    unet, texts = base.denoiser.build(torch.float32), base.text.build(torch.float32)  # the test's own seeding
    base = with_text_encoders(with_network(base, lambda dtype: unet), lambda dtype: list(texts.values()))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    torch.manual_seed(3)
    assert seeds == [3]
    state = torch.get_rng_state()
    _train(tmp_path, base=base)
    assert seeds == [3]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_device_of_ones_own_is_seeded_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with dropout on a GPU, by a stand-in for torch.cuda."""
    said: list[Any] = []

    class Card:
        state = "as it was"

        @classmethod
        def get_rng_state(cls) -> str:
            return cls.state

        @classmethod
        def set_rng_state(cls, state: str) -> None:
            cls.state = state

        @classmethod
        def manual_seed(cls, seed: int) -> None:
            cls.state = f"seeded {seed}"

        @staticmethod
        @contextmanager
        def device(device: torch.device) -> Iterator[None]:
            said.append(device)
            yield

    monkeypatch.setattr(torch, "cuda", Card)
    before = torch.get_rng_state()
    with seeded(5, torch.device("cuda", 1)):
        assert Card.state == "seeded 5"
        drawn = torch.rand(3)
    assert Card.state == "as it was"
    assert said == [torch.device("cuda", 1)] * 2
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_numerics_are_put_back_after_an_error() -> None:
    with _default_dtype(torch.float64), torch.autocast("cpu", torch.bfloat16):
        before = _switches()
        with pytest.raises(ZeroDivisionError), default_numerics():
            assert _switches()[:2] == (torch.float32, False)
            raise ZeroDivisionError
        assert _switches() == before
