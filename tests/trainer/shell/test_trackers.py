"""Trackers, with the real TensorBoard and the real wandb (offline): what they show is what the run's events said."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from subjectbooth.tests.layout_pair import NARROW, write_pair
from subjectbooth.tests.small_base import small_base, small_class_images, small_subject, write_cat_photos
from subjectbooth.trainer.__main__ import main
from subjectbooth.trainer.base.sd import families
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import Event, Started, StepDone, Validation
from subjectbooth.trainer.runs.run import Run
from subjectbooth.trainer.shell import trackers
from subjectbooth.trainer.shell.trackers import Tracker

CONFIG = TrainConfig(
    steps=4,
    learning_rate=1e-3,
    rank=4,
    network_alpha=4.0,
    resolution=64,
    validation_prompts=("{subject} on grass",),
    validation_interval=2,
    validation_steps=2,
)
SCALARS = ("loss", "instance_loss", "prior_loss", "learning_rate", "grad_norm", "seconds")


def follow(
    root: Path, name: str, until: int | None = None, config: TrainConfig = CONFIG
) -> tuple[Run, list[Event], list[str]]:
    """Train with a tracker; with ``until``, cancel at that step. Returns the run, its events and what was said."""
    run = Run(small_base(), small_subject(), small_class_images(), config, root, torch.device("cpu"))
    said: list[str] = []
    seen: list[Event] = []
    tracker = Tracker(name, run.folder, config, said.append)
    events = run.events()
    for event in events:
        tracker.follow(event)
        seen.append(event)
        if isinstance(event, StepDone) and event.step == until:
            events.close()
            break
    tracker.close()
    return run, seen, said


def expected(events: list[Event], name: str) -> list[tuple[int, float]]:
    """The curve `name` as the events tell it."""
    return [
        (event.step, event.losses[name] if name in event.losses else getattr(event, name))
        for event in events
        if isinstance(event, StepDone)
    ]


def test_tensorboard_shows_a_run_that_went_on_as_one_curve(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, first, _ = follow(tmp_path, "tensorboard", until=3)
    run, second, said = follow(tmp_path, "tensorboard")
    assert not said
    assert isinstance(second[0], Started)
    assert second[0].step == 3
    shown = EventAccumulator(str(run.folder.path / "tensorboard"), size_guidance={"images": 0}).Reload()
    for name in SCALARS:
        told = expected(first + second, name)
        assert [value.step for value in shown.Scalars(name)] == [1, 2, 3, 4]
        assert [value.value for value in shown.Scalars(name)] == pytest.approx([value for _, value in told], rel=1e-6)
    (prompt,) = run.validation_prompts
    assert shown.Tags()["images"] == [prompt]
    pictures = shown.Images(prompt)
    drawn = [event for event in first + second if isinstance(event, Validation)]
    assert [picture.step for picture in pictures] == [event.step for event in drawn]
    path = tmp_path / "last.png"
    path.write_bytes(pictures[-1].encoded_image_string)
    with Image.open(path) as image:
        assert np.abs(np.asarray(image) / 255 - drawn[-1].images[0].numpy()).max() <= 1 / 255
    (text,) = shown.Tensors("settings/text_summary")[-1].tensor_proto.string_val
    assert json.loads(text)["learning_rate"] == 1e-3


def test_steps_after_the_checkpoint_are_shown_once(tmp_path: Path) -> None:
    """A killed run has shown steps that its checkpoint does not have."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, events, _ = follow(tmp_path, "tensorboard", until=2)
    beyond = Tracker("tensorboard", run.folder, CONFIG, print)
    beyond.follow(dataclasses.replace(events[0], step=2))
    lost = next(event for event in events if isinstance(event, StepDone))
    beyond.follow(dataclasses.replace(lost, step=3, loss=1e6))
    beyond.close()
    _, more, _ = follow(tmp_path, "tensorboard")
    shown = EventAccumulator(str(run.folder.path / "tensorboard")).Reload().Scalars("loss")
    assert [(value.step, value.value) for value in shown] == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in expected(events + more, "loss")
    ]


def test_wandb_offline_has_settings_curves_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run, events, said = follow(tmp_path, "wandb")
    assert not said
    (log,) = (run.folder.path / "wandb").glob("offline-run-*/run-*.wandb")
    config, history = _read_wandb(_finished(log))
    assert log.stem == f"run-{run.folder.key[:16]}"
    assert config["rank"] == 4
    assert config["chosen"]["precision"] == "fp32"
    for name in SCALARS:
        assert [(row["step"], row[name]) for row in history if name in row] == expected(events, name)
    drawn = [event for event in events if isinstance(event, Validation)]
    shown = [row["step"] for row in history if any(name.startswith("validation") for name in row)]
    assert shown == [event.step for event in drawn]
    assert len(list(log.parent.glob("files/media/images/validation_*.png"))) == len(drawn)
    assert config["host"] == "-"
    for private in (tmp_path, Path(__file__).parents[2], sys.prefix):
        assert str(private).encode() not in log.read_bytes()


def _finished(log: Path) -> Path:
    """Once W&B's service, a process of its own, has written its last record, which it may do after a run's end."""
    from wandb.proto import wandb_internal_pb2

    latest = time.monotonic() + 60
    while time.monotonic() < latest:
        for content in _records(log.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.HasField("exit"):
                return log
        time.sleep(0.1)
    raise AssertionError(f"{log.name}, {log.stat().st_size} bytes, has no end")


def _read_wandb(log: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and logged rows of an offline run."""
    from wandb.proto import wandb_internal_pb2

    config: dict[str, Any] = {}
    history = []
    for content in _records(log.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        # A service that starts slowly may log the settings in a record of their own.
        for item in (*record.run.config.update, *record.config.update):
            config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        config |= {"host": record.run.host} if record.HasField("run") else {}
        if record.history.item:
            history.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
    return config, history


def _records(log: bytes) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log format (blocks of 32 KiB; checksum, length and type before each piece of a
    record, type 1 whole, 2 first, 3 middle, 4 last) behind a header of 7 bytes."""
    at, block, record = 7, 32768, b""
    while at + 7 <= len(log):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        if at + 7 + length > len(log):  # still being written
            return
        record = (record if kind in (3, 4) else b"") + log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record


class _Failing:
    """A service that stops answering. A stub: the real one cannot be made to fail at will."""

    def __init__(self, *_: object) -> None: ...

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        if step == 2:
            raise ConnectionError("no route to host")

    def log_images(self, event: Validation) -> None:
        raise AssertionError("asked again after it failed")

    def close(self) -> None:
        raise ConnectionError("still none")


def test_a_tracker_that_fails_is_said_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.BACKENDS, "wandb", _Failing)
    run, events, said = follow(tmp_path / "tracked", "wandb")
    assert said == ["this run is no longer logged to wandb (ConnectionError: no route to host); training continues"]
    plain, _, _ = follow(tmp_path / "plain", "none")
    assert events[-1].step == 4
    assert _tensors(run.folder.lora_path(4)) == _tensors(plain.folder.lora_path(4))


def test_a_tracker_that_fails_at_the_end_is_said_in_the_past_tense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailingAtTheEnd(_Failing):
        def log_scalars(self, values: dict[str, float], step: int) -> None: ...

        def log_images(self, event: Validation) -> None: ...

    monkeypatch.setitem(trackers.BACKENDS, "wandb", FailingAtTheEnd)
    run, events, said = follow(tmp_path, "wandb")
    assert said == ["this run is no longer logged to wandb (ConnectionError: still none); the run is not affected"]
    assert events[-1].step == 4 and run.folder.lora_path(4).is_file()


def test_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """With the package, and without it: the same LoRA, and one sentence."""
    monkeypatch.setattr(families, "FAMILIES", tuple(NARROW.values()))
    photos = tmp_path / "photos"
    write_cat_photos(photos)
    base = write_pair(tmp_path, "SD 1.x")[0]
    arguments = [
        "--base",
        str(base),
        "--photos",
        str(photos),
        "--class-word",
        "cat",
        "--resolution",
        "64",
        "--rank",
        "2",
        "--cpu",
        "--steps",
        "2",
        "--report_to",
        "tensorboard",
        "--output_dir",
    ]
    assert main([*arguments, str(tmp_path / "with")]) == 0
    assert "no longer logged" not in "".join(capfd.readouterr())
    assert len(list((tmp_path / "with").glob("runs/*/tensorboard/events.*"))) == 1
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert main([*arguments, str(tmp_path / "without")]) == 0
    said = "".join(capfd.readouterr())
    assert said.count("the package tensorboard is not installed") == 1
    assert not list((tmp_path / "without").glob("runs/*/tensorboard"))
    with_it, without = (tmp_path / folder / "my_subject.safetensors" for folder in ("with", "without"))
    assert _tensors(with_it) == _tensors(without)


def _tensors(path: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
