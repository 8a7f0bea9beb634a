"""Options as a whole run applies them, against the same computed by hand: what drops out, what is averaged, mirrored,
and what a validation picture is drawn with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from subjectbooth.tests.small_base import (
    FAMILY,
    HashedPrompts,
    small_base,
    small_denoiser,
    small_subject,
    small_text_encoder,
    small_unet,
)
from subjectbooth.trainer.base.base_model import BaseModel
from subjectbooth.trainer.base.conditioning import Conditioning, EncodedText
from subjectbooth.trainer.base.sd.sample import sample
from subjectbooth.trainer.base.sd.target_layers import target_layers, text_target_layers
from subjectbooth.trainer.base.sd.text_encoder import encode
from subjectbooth.trainer.base.stored.stored_base import token_chunks
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import Started, StepDone, Validation
from subjectbooth.trainer.learn import adapter
from subjectbooth.trainer.learn.data import TrainingData
from subjectbooth.trainer.learn.loop import Training
from subjectbooth.trainer.learn.viewer import VALIDATION_SEED
from subjectbooth.trainer.runs.run import Run
from subjectbooth.trainer.subject.photo import Photo
from subjectbooth.trainer.subject.subject import Subject

CPU = torch.device("cpu")
PROMPT = "a photo of ohwx dog"
CONFIG = TrainConfig(
    steps=4,
    learning_rate=0.02,
    rank=4,
    network_alpha=4.0,
    resolution=64,
    validation_prompts=(PROMPT,),
    validation_interval=0,
    validation_steps=4,
    validation_guidance_scale=3.0,
)

Weights = dict[str, torch.Tensor]


def _data() -> TrainingData:
    random = torch.Generator().manual_seed(1)
    encoded = {prompt: EncodedText(torch.randn(1, 77, 16, generator=random)) for prompt in ("", PROMPT)}
    return TrainingData(torch.randn(3, 4, 8, 8, generator=random), (PROMPT,) * 3, encoded)


def _train(data: TrainingData, **changes: Any) -> tuple[list[Weights], Weights, list[torch.Tensor]]:
    """The adapter before the first step and after each one; the file; the validation pictures."""
    weights, pictures = [], []
    config = dataclasses.replace(CONFIG, **changes)
    with Training(small_base(), data, config, (PROMPT,), device=CPU) as training:
        for event in training.events():
            if isinstance(event, (Started, StepDone)):
                weights.append(training.snapshot().adapter)
            elif isinstance(event, Validation):
                pictures.append(event.images)
        return weights, training.lora(), pictures


def _average(weights: list[Weights], decay: float) -> Weights:
    average = dict(weights[0])
    for number, step in enumerate(weights[1:]):
        now = min(decay, (1 + number) / (10 + number))
        average = {name: now * tensor + (1 - now) * step[name] for name, tensor in average.items()}
    return average


def _drawn_by_hand(weights: Weights, data: TrainingData) -> torch.Tensor:
    """A validation picture of fresh modules with these weights, in which nothing drops out."""
    unet, text = small_unet(), small_text_encoder()
    for module, name, targets in ((unet, "unet", target_layers), (text, "lora_te", text_target_layers)):
        own = {key.removeprefix(f"{name}/"): tensor for key, tensor in weights.items() if key.startswith(f"{name}/")}
        if own:
            adapter.inject(module, CONFIG, targets(module, CONFIG.lora_targets))
            adapter.load_adapter_state(module, own)
    if any(key.startswith("lora_te/") for key in weights):
        with torch.no_grad():
            prompt, negative = encode(
                [text], FAMILY.text_encoders, [token_chunks(words, FAMILY) for words in (PROMPT, "")], None
            )
    else:
        prompt, negative = data.encoded[PROMPT], data.encoded[""]
    drawing = sample(
        unet,
        small_denoiser().noise_scheduler,
        prompt,
        negative,
        (4, 8, 8),
        CONFIG.validation_steps,
        CONFIG.validation_guidance_scale,
        [VALIDATION_SEED],
        CPU,
    )
    while True:
        try:
            next(drawing)
        except StopIteration as finished:
            return small_base().codec.decode(finished.value).permute(0, 2, 3, 1)


def test_the_file_of_a_run_with_ema_has_the_average_of_its_steps() -> None:
    plain, _, _ = _train(_data())
    steps, file, _ = _train(_data(), ema_decay=0.7)
    assert all(torch.equal(plain[-1][name], steps[-1][name]) for name in plain[-1]), "the training is the same"
    expected = {name.removeprefix("unet/"): tensor for name, tensor in _average(steps, 0.7).items()}
    for name, tensor in adapter.to_file(expected, small_denoiser().file_key, 4.0).items():
        torch.testing.assert_close(file[name], tensor, rtol=1e-5, atol=1e-7)
    ups = [name for name in expected if "lora_B" in name]
    assert any(float((expected[name] - steps[-1][f"unet/{name}"]).abs().max()) > 0.001 for name in ups)


def test_every_layer_of_a_rank_stabilised_runs_file_has_the_alpha_that_was_trained_with() -> None:
    for use_rslora, alpha in ((False, 3.0), (True, 3.0 * math.sqrt(4))):
        _, file, _ = _train(
            _data(), steps=1, network_alpha=3.0, use_rslora=use_rslora, train_text_encoder=True, validation_prompts=()
        )
        found = {name: float(tensor) for name, tensor in file.items() if name.endswith(".alpha")}
        assert {name.split("_")[1] for name in found} == {"unet", "te"}
        assert list(found.values()) == pytest.approx([alpha] * len(found))


def test_validation_pictures_are_drawn_with_the_average() -> None:
    data = _data()
    steps, _, (picture,) = _train(data, ema_decay=0.7)
    torch.testing.assert_close(picture, _drawn_by_hand(_average(steps, 0.7), data), rtol=0, atol=1e-3)
    assert float((picture - _drawn_by_hand(steps[-1], data)).abs().max()) > 0.01


def test_nothing_drops_out_of_validation_pictures() -> None:
    """Neither in the UNet nor in a trained text encoder, and the process's random state is as it was."""
    data, state = _data(), torch.get_rng_state()
    steps, _, (picture,) = _train(data, lora_dropout=0.5, train_text_encoder=True, text_encoder_lr=0.02)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(picture, _drawn_by_hand(steps[-1], data), rtol=0, atol=1e-3)


def test_with_dropout_too_looking_changes_nothing_of_a_training() -> None:
    settings = {"lora_dropout": 0.5, "train_text_encoder": True, "text_encoder_lr": 0.02}
    alone, looked = (_train(_data(), validation_interval=interval, **settings) for interval in (0, 1))
    assert (len(alone[2]), len(looked[2])) == (1, 4)
    assert all(torch.equal(alone[1][name], looked[1][name]) for name in alone[1])


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_that_share_of_the_loras_inputs_drops_out_and_the_rest_makes_up_for_it(share: float) -> None:
    text, prompt = small_text_encoder(), token_chunks(PROMPT, FAMILY)
    layers = text_target_layers(text, CONFIG.lora_targets)
    adapter.inject(text, dataclasses.replace(CONFIG, lora_dropout=share), layers)
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str, of_output: bool) -> Any:
        return lambda _, given, output: inputs.update({name: (output if of_output else given[0]).detach()})

    for name, module in text.named_modules():
        if name.endswith((".lora_dropout.subject", ".base_layer")):
            module.register_forward_hook(keep(name, "dropout" in name))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encode([text], FAMILY.text_encoders, [prompt], None)
    whole = torch.cat(
        [inputs[name.replace("lora_dropout.subject", "base_layer")].flatten() for name in inputs if "dropout" in name]
    )
    seen = torch.cat([tensor.flatten() for name, tensor in inputs.items() if "dropout" in name])
    dropped = (seen == 0) & (whole != 0)
    assert float(dropped.float().mean()) == pytest.approx(share, abs=0.02)
    torch.testing.assert_close(seen[~dropped], whole[~dropped] / (1 - share))


def _losses(root: Path, pixels: np.ndarray, flip: bool) -> Iterator[float]:
    subject = small_subject(1)
    subject = dataclasses.replace(subject, photos=(dataclasses.replace(subject.photos[0], pixels=pixels),))
    # At this rate the weights stay where they are, so that every loss is of the same model.
    config = dataclasses.replace(CONFIG, learning_rate=1e-9, steps=6, flip=flip)
    for event in Run(small_base(), subject, None, config, root, CPU).events():
        if isinstance(event, StepDone):
            yield event.loss


def test_flip_mirrors_left_and_right_and_nothing_else(tmp_path: Path) -> None:
    half = np.random.default_rng(0).integers(0, 255, (80, 40, 3), dtype=np.uint8)
    left_is_right = np.concatenate([half, half[:, ::-1]], axis=1)
    top_is_bottom = left_is_right.transpose(1, 0, 2).copy()
    same, other = (
        [list(_losses(tmp_path, pixels, flip)) for flip in (False, True)] for pixels in (left_is_right, top_is_bottom)
    )
    assert same[0] == pytest.approx(same[1], rel=1e-4)
    changed = [abs(plain - mirrored) > 1e-3 * plain for plain, mirrored in zip(*other, strict=True)]
    assert 1 <= sum(changed) < 6  # some of the six were mirrored


@pytest.mark.parametrize("buckets", [False, True])
def test_masks_that_the_loss_does_not_use_make_no_other_run(tmp_path: Path, buckets: bool) -> None:
    corner = np.zeros((80, 80), np.float32)
    corner[:30, :30] = 1.0
    plain = small_subject()
    masked = dataclasses.replace(plain, photos=tuple(dataclasses.replace(p, mask=corner) for p in plain.photos))

    def key(subject: Subject, masked_loss: bool, crop: str = "center") -> str:
        config = dataclasses.replace(CONFIG, masked_loss=masked_loss, enable_bucket=buckets)
        return Run(small_base(), dataclasses.replace(subject, crop=crop), None, config, tmp_path, CPU).folder.key

    assert key(masked, False) == key(plain, False)
    assert key(masked, True) != key(masked, False)
    assert key(masked, False, "subject") != key(plain, False, "subject")  # there they say where to crop


@pytest.mark.parametrize("buckets", [False, True])
def test_a_masked_loss_that_learns_nothing_is_refused_before_the_base_is_read(tmp_path: Path, buckets: bool) -> None:
    left = np.zeros((80, 400), np.float32)  # more than any bucket keeps
    left[:, :20] = 1.0
    wide = np.random.default_rng(0).integers(0, 255, (80, 400, 3), dtype=np.uint8)
    plain = small_subject()
    photos = tuple(dataclasses.replace(p, pixels=wide, mask=left) for p in plain.photos)
    config = dataclasses.replace(CONFIG, masked_loss=True, enable_bucket=buckets)

    def run(*photos: Photo) -> Run:
        return Run(small_base(), dataclasses.replace(plain, photos=photos), None, config, tmp_path, CPU)

    with pytest.raises(SubjectBoothError, match=r"every mask is outside the crop 'center': 0.png, 1.png and 2.png\."):
        run(*photos)
    with closing(run(photos[0], *plain.photos[1:]).events()) as events:
        started = next(events)
    assert isinstance(started, Started)
    assert any(note.startswith("The mask of 0.png is outside the crop") for note in started.notes)


def test_captions_are_encoded_as_text_and_prompts_as_prompts(tmp_path: Path) -> None:
    """An encoder with a syntax of its own gets captions so that it reads their very text; pictures keep the syntax."""
    asked: list[str] = []

    class Listening(HashedPrompts):
        def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
            asked.extend(prompts)
            return super().encode(prompts)

    def escaped(caption: str) -> str:
        return caption.replace("(", "<")

    plain = small_base()
    comfy = dataclasses.replace(plain, prompts=Listening(), prompt_of=escaped)
    config = dataclasses.replace(CONFIG, steps=1, validation_prompts=("a (photo:1.2)",))

    def run(base: BaseModel, caption: str) -> Run:
        subject = small_subject()
        photos = tuple(dataclasses.replace(photo, caption=caption) for photo in subject.photos)
        return Run(base, dataclasses.replace(subject, photos=photos), None, config, tmp_path, CPU)

    assert run(comfy, PROMPT).folder.key == run(plain, PROMPT).folder.key, "runs of before are found again"
    assert run(comfy, "ohwx (toy)").folder.key != run(plain, "ohwx (toy)").folder.key, "it was trained on a weight"
    run(comfy, "ohwx (toy)").plan()
    assert {"ohwx <toy)", "a (photo:1.2)"} <= set(asked) and "ohwx (toy)" not in asked
