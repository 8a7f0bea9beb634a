"""Pictures drawn together, and the models that are on the training device only while they work."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from subjectbooth.tests.small_base import (
    FAMILY,
    small_base,
    small_denoiser,
    small_subject,
    small_text_encoder,
    small_unet,
    with_network,
)
from subjectbooth.trainer.base.conditioning import EncodedText, concatenate
from subjectbooth.trainer.base.sd import codecs
from subjectbooth.trainer.base.sd.codecs import TinyCodec
from subjectbooth.trainer.base.sd.sample import sample
from subjectbooth.trainer.base.stored.stored_base import StoredPromptEncoder
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import Adjusted, Event, Validation, ValidationStep
from subjectbooth.trainer.learn import viewer
from subjectbooth.trainer.memory import drawing
from subjectbooth.trainer.memory.drawing import draw_all, pictures_at_once
from subjectbooth.trainer.preserve import generate as making
from subjectbooth.trainer.preserve.generate import generate
from subjectbooth.trainer.preserve.priors import ClassPriors
from subjectbooth.trainer.runs.run import Run

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ELSEWHERE = torch.device("cpu", 0)
"""Not the device that modules are made on, as far as the trainer can see; tensors on it can be computed with."""
CONFIG = TrainConfig(
    steps=1,
    rank=4,
    network_alpha=4.0,
    resolution=64,
    validation_interval=0,
    validation_steps=3,
    validation_prompts=("{subject}", "a {subject} on grass", "{subject} by the sea"),
)


class Limit:
    """A UNet hook that fails as CUDA does for batches above ``size``."""

    def __init__(self, size: int) -> None:
        self.size, self.sizes = size, list[int]()

    def __call__(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if not module.training:
            self.sizes.append(len(arguments[0]))
            if len(arguments[0]) > self.size:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _validate(root: Path, limit: Limit) -> list[Event]:
    def build(dtype: torch.dtype) -> Any:
        unet = small_unet()
        unet.register_forward_pre_hook(limit)
        return unet

    base = with_network(small_base(), build)
    return [
        event
        for event in Run(base, small_subject(), None, CONFIG, root, CPU).events()
        if isinstance(event, (ValidationStep, Validation, Adjusted))
    ]


def _pictures(events: list[Event]) -> torch.Tensor:
    return next(event.images for event in events if isinstance(event, Validation))


def _done(events: list[Event]) -> list[tuple[int, int]]:
    return [(event.done, event.total) for event in events if isinstance(event, ValidationStep)]


def test_validation_pictures_drawn_together_are_those_drawn_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = Limit(99)
    alone = _validate(tmp_path / "alone", limit)
    assert set(limit.sizes) == {2}  # a CPU: one picture, with its prompt and the empty one
    assert _done(alone) == [(done, 9) for done in range(1, 10)]
    monkeypatch.setattr(viewer, "pictures_at_once", lambda *_: 2)
    limit = Limit(99)
    together = _validate(tmp_path / "together", limit)
    assert limit.sizes == [4] * 3 + [2] * 3
    assert _done(together) == [(2, 9), (4, 9), (6, 9), (7, 9), (8, 9), (9, 9)]
    torch.testing.assert_close(_pictures(together), _pictures(alone), atol=1e-4, rtol=0)
    assert float((_pictures(alone)[0] - _pictures(alone)[1]).abs().max()) > 0.05  # each has its own noise and prompt
    # Where that was too much for the memory after all: fewer, and in the end none, which the run survives.
    limit = Limit(2)
    fewer = _validate(tmp_path / "fewer", limit)
    assert limit.sizes == [4] + [2] * 9
    assert torch.equal(_pictures(fewer), _pictures(alone))
    none = _validate(tmp_path / "none", Limit(1))
    assert [type(event) for event in none] == [Adjusted]


def test_a_prompt_keeps_its_meaning_beside_a_longer_one() -> None:
    unet, random = small_unet(), torch.Generator().manual_seed(2)
    prompts = [EncodedText(torch.randn(1, 77 * chunks, 16, generator=random)) for chunks in (1, 2, 3)]
    negative = EncodedText(torch.randn(1, 77, 16, generator=random))

    def draw(*numbers: int) -> torch.Tensor:
        return _drawn(
            sample(
                unet,
                small_base().denoiser.noise_scheduler,
                concatenate([prompts[number] for number in numbers]),
                negative,
                (4, 8, 8),
                3,
                3.0,
                numbers,
                CPU,
            )
        )

    torch.testing.assert_close(draw(0, 1, 2), torch.cat([draw(0), draw(1), draw(2)]), atol=1e-4, rtol=1e-4)


def _drawn(pictures: Generator[int, None, torch.Tensor]) -> torch.Tensor:
    while True:
        try:
            next(pictures)
        except StopIteration as finished:
            return finished.value  # type: ignore[no-any-return]


def test_no_memory_for_a_single_picture_is_what_torch_said() -> None:
    tried: list[tuple[int, int]] = []

    def fails(first: int, last: int) -> Generator[int, None, torch.Tensor]:
        tried.append((first, last))
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    with pytest.raises(torch.OutOfMemoryError):
        _drawn(draw_all(fails, 7, 5, 3, CPU))
    assert tried == [(0, 5), (0, 2), (0, 1)]


def test_as_many_pictures_as_fit_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = small_unet()

    def choose(device: torch.device, free: int | None, count: int = 9) -> int:
        prompt = EncodedText(torch.zeros(1, 77, 16))
        return pictures_at_once(small_denoiser(), unet, prompt, (4, 8, 8), torch.float32, count, device, free)

    monkeypatch.setattr(drawing, "drawing_bytes", lambda *_: 1000)  # half a picture's
    assert [choose(GPU, free) for free in (1000, 4000, 4500, 7000, 99_000)] == [1, 1, 2, 3, 4]
    assert choose(GPU, 99_000, count=3) == 3
    assert choose(GPU, None) == choose(CPU, 99_000) == 1

    def fails(*_: Any) -> int:
        raise NotImplementedError("another diffusers")

    monkeypatch.setattr(drawing, "drawing_bytes", fails)
    assert choose(GPU, 99_000) == 1


def _class_images(root: Path, count: int = 5, hook: Callable[..., Any] | None = None) -> ClassPriors:
    def build(dtype: torch.dtype) -> Any:
        unet = small_unet()
        if hook:
            unet.register_forward_pre_hook(hook)
        return unet

    base = with_network(small_base(), build)
    made = list(generate(base, "a photo of a dog", count, 64, root, CPU, steps=3))
    assert isinstance(made[-1], ClassPriors) and made[:-1][-1:] in ([], [count])
    return made[-1]


def test_class_images_drawn_together_are_those_drawn_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = _class_images(tmp_path / "alone")
    # On a CPU a picture's bits are the same however many are made.
    assert _class_images(tmp_path / "fewer", 2).hashes == alone.hashes[:2]
    monkeypatch.setattr(making, "pictures_at_once", lambda *_: 4)
    limit = Limit(99)
    together = _class_images(tmp_path / "together", hook=limit)
    assert limit.sizes == [8] * 3 + [2] * 3
    torch.testing.assert_close(together.latents, alone.latents, atol=1e-4, rtol=1e-4)
    assert together.store == alone.store  # one recipe: what is there is found again, on whichever device it was made
    assert _class_images(tmp_path / "together").hashes == together.hashes
    limit = Limit(4)
    assert _class_images(tmp_path / "less memory", hook=limit).latents.shape == (5, 4, 8, 8)
    assert limit.sizes == [8] + [4] * 6 + [2] * 3
    with pytest.raises(SubjectBoothError, match="Too little memory on cpu for a class image"):
        _class_images(tmp_path / "none", hook=Limit(1))


def _moves(monkeypatch: pytest.MonkeyPatch, module: str) -> list[torch.device]:
    moves: list[torch.device] = []
    move = torch.nn.Module.to

    def to(self: torch.nn.Module, *arguments: Any, **keywords: Any) -> torch.nn.Module:
        if type(self).__name__ == module:
            moves.append(arguments[0])
        return move(self, *arguments, **keywords)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    return moves


def test_the_vae_is_on_the_device_while_it_works_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderTiny

    codec = TinyCodec(AutoencoderTiny().state_dict(), "test")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = codec.encode(images)
    expected = latents, codec.decode(latents)
    moves = _moves(monkeypatch, "AutoencoderTiny")
    codec.device = ELSEWHERE
    assert torch.equal(codec.encode(images), expected[0])
    assert moves == [ELSEWHERE, CPU]
    assert torch.equal(codec.decode(latents), expected[1])
    assert moves == [ELSEWHERE, CPU] * 2
    # A device with too little memory for a picture leaves it to the CPU.
    freed: list[torch.device] = []
    monkeypatch.setattr(codecs, "free_memory", freed.append)
    on_device = [True, False]

    def too_little(module: torch.nn.Module, _: Any) -> None:
        if on_device.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = codec._model.decoder.register_forward_pre_hook(too_little)
    assert torch.equal(codec.decode(latents), expected[1])
    assert freed == [ELSEWHERE] and on_device == [] and moves == [ELSEWHERE, CPU] * 3
    handle.remove()


def test_a_frozen_text_encoder_works_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = StoredPromptEncoder(lambda: [small_text_encoder()], FAMILY, None).encode(["a dog", ""])
    built = [small_text_encoder(), small_text_encoder()]
    moves = _moves(monkeypatch, "CLIPTextModel")

    def too_little(module: torch.nn.Module, _: Any) -> None:
        if moves[-1] == ELSEWHERE:
            raise torch.OutOfMemoryError("CUDA out of memory")

    built[1].register_forward_pre_hook(too_little)
    for model, expected_moves in zip(built, ([ELSEWHERE], [ELSEWHERE, CPU]), strict=True):
        moves.clear()
        found = StoredPromptEncoder(lambda model=model: [model], FAMILY, None, ELSEWHERE).encode(["a dog", ""])
        assert moves == expected_moves
        for prompt, wanted in zip(found, expected, strict=True):
            assert torch.equal(prompt.hidden_states, wanted.hidden_states)
            assert prompt.hidden_states.device == CPU
