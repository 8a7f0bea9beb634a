"""Runs as a whole: resuming, finding again, cancelling, and what lies in the folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.small_base import (
    small_base,
    small_class_images,
    small_denoiser,
    small_priors,
    small_subject,
    small_unet,
    with_network,
)
from subjectbooth.trainer.base.sd.families import SD1, SD2, SDXL, Family
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import (
    Adjusted,
    CheckpointSaved,
    Event,
    Finished,
    Started,
    StepDone,
    Validation,
)
from subjectbooth.trainer.files.safetensors_file import read_metadata
from subjectbooth.trainer.machine.resolved_settings import ResolvedSettings
from subjectbooth.trainer.preserve.class_images import ClassImages
from subjectbooth.trainer.runs.metadata import lora_metadata, with_output_name
from subjectbooth.trainer.runs.publish import publish
from subjectbooth.trainer.runs.run import Run

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=6, learning_rate=1e-3, rank=4, network_alpha=4.0, resolution=64, train_batch_size=2)


def _run(root: Path, config: TrainConfig = CONFIG, *, priors: bool = True, seed: int = 0) -> Run:
    return Run(small_base(seed=seed), small_subject(), small_class_images() if priors else None, config, root, CPU)


def _read(events: Iterator[Event], until_step: int | None = None) -> list[Event]:
    """Read the events; with ``until_step``, cancel there as a node does."""
    seen = []
    for event in events:
        seen.append(event)
        if isinstance(event, StepDone) and event.step == until_step:
            events.close()
            break
    return seen


def _lora(run: Run, step: int = 6) -> bytes:
    path = run.folder.finished_lora(step)
    assert path is not None
    return path.read_bytes()


@pytest.mark.oldest
@pytest.mark.parametrize("priors", [True, False])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_cancelled_anywhere_ends_bit_identical_to_an_uninterrupted_one(
    tmp_path: Path, priors: bool, schedule: str, accumulate: int
) -> None:
    config = TrainConfig(
        **{
            **CONFIG.to_json(),
            "validation_prompts": (),
            "lr_scheduler": schedule,
            "lr_warmup_steps": 2,
            "gradient_accumulation_steps": accumulate,
        }
    )
    whole = _run(tmp_path / "whole", config, priors=priors)
    _read(whole.events())
    cut = _run(tmp_path / "cut", config, priors=priors)
    for stop in (1, 2, 5):
        torch.manual_seed(stop)  # nothing may depend on the process's random state
        _read(_run(tmp_path / "cut", config, priors=priors).events(), until_step=stop)
        assert cut.folder.load_checkpoint(6).step == stop
    last = _read(_run(tmp_path / "cut", config, priors=priors).events())
    assert isinstance(last[0], Started)
    assert last[0].step == 5
    first = safetensors.torch.load(_lora(whole))
    second = safetensors.torch.load(_lora(cut))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert cut.folder.losses(6) == whole.folder.losses(6)
    assert len(cut.folder.losses(6)) == 6


@pytest.mark.oldest
def test_validation_pictures_do_not_change_training(tmp_path: Path) -> None:
    looked = TrainConfig(
        **{
            **CONFIG.to_json(),
            "validation_prompts": ("a photo of {subject}", "{subject} on grass"),
            "validation_interval": 2,
            "validation_steps": 3,
        }
    )
    with_pictures, without = _run(tmp_path / "a", looked), _run(tmp_path / "b")
    events = _read(with_pictures.events())
    _read(without.events())
    assert with_pictures.folder.key == without.folder.key
    first, second = (safetensors.torch.load(_lora(run)) for run in (with_pictures, without))
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [event for event in events if isinstance(event, Validation)]
    assert [event.step for event in drawn] == [2, 4, 6]
    assert drawn[0].prompts == ("a photo of ohwx dog", "ohwx dog on grass")
    assert drawn[0].images.shape == (2, 64, 64, 3)
    assert not torch.equal(drawn[0].images, drawn[2].images)  # the adapter is in the pictures
    kept, missing = with_pictures.validations(6)
    assert [step for step, _ in kept] == [2, 4, 6]
    torch.testing.assert_close(kept[0][1], drawn[0].images, atol=1 / 255, rtol=0)
    assert missing == []
    # An adapter for every picture, so that a picture that pleases can be used.
    assert all(with_pictures.folder.finished_lora(step) for step in (2, 4, 6))


def test_pictures_of_other_prompts_are_not_handed_out(tmp_path: Path) -> None:
    def asked(prompt: str, steps: int) -> Run:
        return _run(
            tmp_path,
            TrainConfig(
                **{
                    **CONFIG.to_json(),
                    "steps": steps,
                    "validation_prompts": (prompt,),
                    "validation_interval": 2,
                    "validation_steps": 3,
                }
            ),
        )

    _read(asked("{subject} on grass", 4).events())
    longer = asked("{subject} at night", 6)
    _read(longer.events())
    assert [step for step, _ in longer.folder.validations(6, ("ohwx dog on grass",))] == [2, 4]
    found, missing = longer.validations(6)
    assert [step for step, _ in found] == [6]
    assert missing == [2, 4]
    assert asked("{subject} on grass", 4).validations(4)[1] == []


def test_pictures_of_other_sampling_settings_are_not_handed_out(tmp_path: Path) -> None:
    def asked(**settings: float) -> Run:
        return _run(
            tmp_path,
            TrainConfig(
                **{
                    **CONFIG.to_json(),
                    "steps": 2,
                    "validation_prompts": ("a photo of {subject}",),
                    "validation_steps": 2,
                    "validation_guidance_scale": 3.0,
                    **settings,
                }
            ),
        )

    _read(asked().events())
    assert asked().validations(2)[1] == []
    for changed in ({"validation_steps": 3}, {"validation_guidance_scale": 1.0}):
        again = asked(**changed)
        assert isinstance(_read(again.events())[-1], Finished)
        assert again.validations(2) == ([], [2])
    # A run that was logged before these settings were keeps its pictures.
    log = asked().folder.path / "events.jsonl"
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    before = [
        {name: value for name, value in line.items() if name not in ("sampling_steps", "guidance_scale")}
        for line in lines
    ]
    log.write_text("\n".join(json.dumps(line) for line in before), "utf-8")
    assert [step for step, _ in asked(validation_steps=3).validations(2)[0]] == [2]


@pytest.mark.oldest
def test_a_finished_run_is_found_again_and_a_forced_one_writes_the_same_bytes(tmp_path: Path) -> None:
    _read(_run(tmp_path).events())
    first = _lora(_run(tmp_path))
    again = _read(_run(tmp_path).events())
    assert [type(event) for event in again] == [Finished]
    assert not again[0].trained
    forced = _read(_run(tmp_path).events(force_retrain=True))
    assert sum(isinstance(event, StepDone) for event in forced) == 6
    assert _lora(_run(tmp_path)) == first


def test_more_steps_go_on_with_a_constant_schedule_only(tmp_path: Path) -> None:
    longer = TrainConfig(**{**CONFIG.to_json(), "validation_prompts": (), "steps": 8})
    _read(_run(tmp_path).events())
    events = _read(_run(tmp_path, longer).events())
    assert [event.step for event in events if isinstance(event, StepDone)] == [7, 8]
    cosine = TrainConfig(**{**CONFIG.to_json(), "validation_prompts": (), "lr_scheduler": "cosine"})
    assert (
        _run(tmp_path, cosine).folder.key
        != _run(tmp_path, TrainConfig(**{**cosine.to_json(), "validation_prompts": (), "steps": 8})).folder.key
    )


@pytest.mark.parametrize("change", ["photo", "caption", "prior", "base", "setting", "no priors"])
def test_whatever_changes_the_weights_changes_the_key(tmp_path: Path, change: str) -> None:
    import dataclasses

    base, subject, priors, config = small_base(), small_subject(), small_class_images(), CONFIG
    before = Run(base, subject, priors, config, tmp_path, CPU).folder.key
    photo = subject.photos[1]
    if change == "photo":
        pixels = photo.pixels.copy()
        pixels[40, 40, 0] ^= 128
        subject = dataclasses.replace(
            subject, photos=(subject.photos[0], dataclasses.replace(photo, pixels=pixels), subject.photos[2])
        )
    elif change == "caption":
        other = dataclasses.replace(photo, caption="a drawing of ohwx dog")
        subject = dataclasses.replace(subject, photos=(subject.photos[0], other, subject.photos[2]))
    elif change == "prior":
        priors = ClassImages(dataclasses.replace(small_priors(), digest="other"))
    elif change == "base":
        base = small_base(seed=1)
    elif change == "setting":
        config = TrainConfig(**{**CONFIG.to_json(), "validation_prompts": (), "rank": 5})
    else:
        priors = None
    assert Run(base, subject, priors, config, tmp_path, CPU).folder.key != before


def test_what_does_not_change_the_weights_does_not_change_the_key(tmp_path: Path) -> None:
    import dataclasses

    before = _run(tmp_path).folder.key
    shown = TrainConfig(
        **{
            **CONFIG.to_json(),
            "validation_prompts": ("x",),
            "validation_interval": 1,
            "validation_steps": 3,
            "validation_guidance_scale": 2.0,
            "checkpoint_seconds": 5.0,
            "gradient_checkpointing": "on",
            "pictures_per_forward": 1,
            "attention": "sdpa",
        }
    )
    assert _run(tmp_path, shown).folder.key == before
    subject = small_subject()
    renamed = dataclasses.replace(
        subject, photos=tuple(dataclasses.replace(photo, name=f"x{photo.name}") for photo in subject.photos[::-1])
    )
    assert Run(small_base(), renamed, small_class_images(), CONFIG, tmp_path, CPU).folder.key == before


def test_a_damaged_checkpoint_is_noticed_and_the_run_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _read(_run(tmp_path / "whole").events())
    _read(_run(tmp_path / "cut").events(), until_step=3)
    folder = _run(tmp_path / "cut").folder
    path = folder.path / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))
    events = _read(_run(tmp_path / "cut").events())
    assert events[0].step == 0
    assert "damaged" in caplog.text
    assert safetensors.torch.load(_lora(_run(tmp_path / "cut"))).keys()
    one, two = (safetensors.torch.load(_lora(_run(tmp_path / name))) for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_damaged_adapter_is_made_anew(tmp_path: Path) -> None:
    _read(_run(tmp_path).events())
    path = _run(tmp_path).folder.lora_path(6)
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    events = _read(_run(tmp_path).events())
    assert isinstance(events[-1], Finished)
    assert path.read_bytes() == whole


def test_an_error_in_the_middle_keeps_the_steps_so_far(tmp_path: Path) -> None:
    def failing() -> None:
        for event in _run(tmp_path).events():
            if isinstance(event, StepDone) and event.step == 4:
                raise MemoryError

    with pytest.raises(MemoryError):
        failing()
    events = _read(_run(tmp_path).events())
    assert events[0].step == 4
    assert _run(tmp_path).folder.finished_lora(4) is not None


def test_a_cancel_right_after_a_checkpoint_still_leaves_an_adapter(tmp_path: Path) -> None:
    """The checkpoint of that step is there already; somebody may want to use the adapter all the same."""
    often = TrainConfig(**{**CONFIG.to_json(), "validation_prompts": (), "checkpoint_seconds": 0.0})
    events = _run(tmp_path, often).events()
    for event in events:
        if isinstance(event, CheckpointSaved) and event.step == 3:
            events.close()
            break
    path = _run(tmp_path, often).folder.finished_lora(3)
    assert path is not None
    assert read_metadata(path)["subjectbooth.step"] == "3"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_adapter(tmp_path: Path) -> None:
    config = TrainConfig(
        **{
            **CONFIG.to_json(),
            "validation_prompts": (),
            "learning_rate": 1.0,
            "steps": 400,
            "network_alpha": 4096.0,
            "max_grad_norm": 0.0,
        }
    )
    with pytest.raises(SubjectBoothError, match="finite numbers"):
        _read(_run(tmp_path, config).events())
    kept = _run(tmp_path, config).folder.load_checkpoint(400)
    assert kept is not None
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.adapter.values())


def test_an_adapter_that_is_still_zero_at_the_end_is_reported(tmp_path: Path) -> None:
    """Here by a UNet from which no gradient comes; whatever the cause, the run is not called trained in silence."""

    def build(dtype: torch.dtype) -> torch.nn.Module:
        unet = small_unet().to(dtype)
        unet.register_forward_hook(lambda module, inputs, output: (output[0] * 0.0,))
        return unet

    base = dataclasses.replace(with_network(small_base(), build), digest="without gradients")
    config = dataclasses.replace(CONFIG, steps=2)

    def events() -> list[Event]:
        return _read(Run(base, small_subject(), None, config, tmp_path, CPU).events())

    first, again = events(), events()
    sentence = "This LoRA has learned nothing: after step 2 all of its weights are still zero"
    assert isinstance(first[-1], Finished) and first[-1].trained and first[-1].warning.startswith(sentence)
    assert isinstance(first[-2], Adjusted) and first[-2].note == first[-1].warning
    assert isinstance(again[-1], Finished) and not again[-1].trained and again[-1].warning == first[-1].warning
    (log,) = tmp_path.glob("*/events.jsonl")
    assert sentence in log.read_text("utf-8")
    learned = _read(_run(tmp_path).events())[-1]
    assert isinstance(learned, Finished) and learned.warning == ""


def test_checkpoints_come_by_the_clock(tmp_path: Path) -> None:
    often = TrainConfig(**{**CONFIG.to_json(), "validation_prompts": (), "checkpoint_seconds": 0.0})
    events = _read(_run(tmp_path, often).events())
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [1, 2, 3, 4, 5, 6]
    # Only the end is worth a file of its own.
    assert len(list(_run(tmp_path, often).folder.path.glob("lora_*"))) == 1


@pytest.mark.parametrize(
    ("family", "prediction_type", "version", "architecture"),
    [
        (SD1, "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        (SD1, "v_prediction", "sd_v1_v", "stable-diffusion-v1/lora"),
        (SD2, "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        (SD2, "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        (SDXL, "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_other_tools_are_told_the_family_in_their_words(
    family: Family, prediction_type: str, version: str, architecture: str
) -> None:
    """As sd-scripts writes them (library/model_util.py, sai_model_spec.py)."""
    denoiser = small_denoiser(prediction_type)
    denoiser = dataclasses.replace(denoiser, layout=dataclasses.replace(denoiser.layout, family=family))
    base = dataclasses.replace(small_base(prediction_type), family=family.name, denoiser=denoiser)
    metadata = lora_metadata(
        "0" * 64,
        small_subject(),
        base,
        CONFIG,
        step=6,
        run_key="0" * 64,
        started=0.0,
        preservation={},
        chosen=ResolvedSettings("adamw"),
        buckets={"64x64": 3},
    )
    assert metadata["ss_base_model_version"] == version
    assert metadata["ss_v2"] == str(family is SD2)
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.prediction_type"] == prediction_type.removesuffix("_prediction")


def test_what_is_saved_is_serialised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three LoRAs and three checkpoints with them, and a copy under another name; SDXL's are hundreds of megabytes."""
    run = _run(tmp_path / "runs", dataclasses.replace(CONFIG, validation_interval=2, checkpoint_seconds=1e6))
    save = mock.Mock(side_effect=safetensors.torch.save)
    monkeypatch.setattr(safetensors.torch, "save", save)
    saved = sum(isinstance(event, CheckpointSaved) for event in run.events())
    assert run.folder.kept_steps() == [2, 4, 6]
    assert save.call_count == 3 + saved
    lora = run.folder.lora_path(6)
    published = publish(lora, tmp_path / "loras", "rex").path
    assert save.call_count == 3 + saved
    expected = safetensors.torch.load_file(lora)
    copied = safetensors.torch.load_file(published)
    assert copied.keys() == expected.keys() and all(copied[name].equal(tensor) for name, tensor in expected.items())
    assert read_metadata(published) == with_output_name(read_metadata(lora), "rex")


def test_the_file_says_what_it_is_and_nothing_of_the_users(tmp_path: Path) -> None:
    run = _run(tmp_path)
    _read(run.events())
    path = run.folder.finished_lora(6)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        layers = {key.split(".")[0] for key in file.keys()}
        assert all(float(file.get_tensor(f"{layer}.alpha")) == 4.0 for layer in layers)
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.trigger_phrase"] == "ohwx dog"
    assert json.loads(metadata["ss_datasets"])[0]["subsets"][0]["class_tokens"] == "ohwx dog"
    whole = " ".join(f"{key} {value}" for key, value in metadata.items())
    assert str(tmp_path) not in whole
    assert "0.png" not in whole


def test_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    import os

    from accelerate.state import AcceleratorState, PartialState

    torch.manual_seed(11)
    state, environment = torch.get_rng_state(), dict(os.environ)
    _read(_run(tmp_path).events(), until_step=3)
    _read(_run(tmp_path).events())
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(os.environ) == environment
    assert not PartialState._shared_state
    assert not AcceleratorState._shared_state
    assert torch.is_grad_enabled()
