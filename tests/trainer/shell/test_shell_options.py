"""What the command line does with paths, sizes and signals, on a small base."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from subjectbooth.tests.layout_pair import NARROW, write_pair
from subjectbooth.tests.small_base import small_base, small_denoiser, small_subject
from subjectbooth.trainer import __main__ as shell
from subjectbooth.trainer.base.sd import families
from subjectbooth.trainer.base.stored.stored_base import stored_resolution
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import StepDone
from subjectbooth.trainer.files.safetensors_file import read_metadata
from subjectbooth.trainer.runs.run import Run
from subjectbooth.trainer.shell import clean as clean_command
from subjectbooth.trainer.shell import recipe, train
from subjectbooth.trainer.shell.options import parser
from subjectbooth.trainer.shell.signals import signals_as_interrupts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    return {name: write_pair(tmp_path_factory.mktemp("pair"), name) for name in NARROW}


@pytest.fixture
def arguments(
    files: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Makes a command line that trains in a few seconds; photos are read by nobody."""
    monkeypatch.setattr(families, "FAMILIES", tuple(NARROW.values()))
    monkeypatch.setattr(recipe, "read_subject", lambda options, resolution: small_subject(resolution=resolution))

    def make(*more: str, name: str = "SD 1.x") -> list[str]:
        return [
            "--base",
            str(files[name][0]),
            "--photos",
            str(tmp_path),
            "--class-word",
            "dog",
            "--output_dir",
            str(tmp_path / "out"),
            "--rank",
            "2",
            "--network_alpha",
            "2",
            "--steps",
            "4",
            "--cpu",
            *more,
        ]

    return make


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGBREAK", 149), ("SIGINT", 130)])
def test_a_signal_keeps_the_steps_so_far(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    code: int,
) -> None:
    if not hasattr(signal, name):
        pytest.skip(f"no {name} on this system")
    number, seen = getattr(signal, name), []
    follow = train.Tracker.follow

    def raising(self: Any, event: Any) -> None:
        follow(self, event)
        if isinstance(event, StepDone):
            seen.append(event.step)
            if event.step == 2 and 3 not in seen:
                signal.raise_signal(number)

    monkeypatch.setattr(train.Tracker, "follow", raising)
    before = signal.getsignal(number)
    if number is not signal.SIGINT and before is signal.SIG_DFL:
        # Without the mend this ends the tests themselves; then it is a failure like any other.
        monkeypatch.setattr(signal, "raise_signal", lambda number: _as_the_system_does(number))
    assert shell.main(arguments("--resolution", "64")) == code
    assert "progress is saved" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    monkeypatch.setattr(
        train.Tracker,
        "follow",
        lambda self, event: (follow(self, event), seen.append(event.step) if isinstance(event, StepDone) else None),
    )
    assert shell.main(arguments("--resolution", "64")) == 0
    assert seen == [1, 2, 3, 4]


def _as_the_system_does(number: int) -> None:
    handler = signal.getsignal(number)
    assert callable(handler), "this signal ends the program"
    handler(number, None)


def test_an_ignored_hangup_stays_ignored() -> None:
    """As nohup starts a program."""
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("no SIGHUP on this system")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_as_interrupts():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("name", "told", "pixels"),
    [("SD 1.x", None, 512), ("SD 2.x", None, 512), ("SD 2.x", "v_prediction", 768), ("SDXL", None, 1024)],
)
def test_a_bases_own_size_is_known_from_its_file(
    files: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch, name: str, told: str | None, pixels: int
) -> None:
    monkeypatch.setattr(families, "FAMILIES", tuple(NARROW.values()))
    assert stored_resolution(files[name][0], told) == stored_resolution(files[name][1], told) == pixels


def test_without_a_resolution_the_bases_own_is_trained(
    arguments: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def read(options: Any, resolution: int) -> Any:
        asked.append(resolution)
        raise SubjectBoothError("enough", "nothing", "stop here")

    monkeypatch.setattr(recipe, "read_subject", read)
    assert shell.main(arguments(name="SDXL")) == 2
    assert shell.main(arguments("--resolution", "512", name="SDXL")) == 2
    assert asked == [1024, 512]


@pytest.mark.parametrize(
    ("family", "pixels", "warned"),
    [
        (families.SDXL, 512, True),
        (families.SDXL, 768, False),
        (families.SD1, 256, True),
        (families.SD1, 384, False),
        (families.SD2, 512, False),
        (families.SD1, 128, False),
    ],
)
def test_a_size_far_below_the_bases_own_is_reported(
    tmp_path: Path, family: families.Family, pixels: int, warned: bool
) -> None:
    """But not below 256 px, where nobody means it otherwise (the demo's base draws 128 px)."""
    denoiser = small_denoiser()
    denoiser = dataclasses.replace(denoiser, layout=dataclasses.replace(denoiser.layout, family=family))
    base = dataclasses.replace(small_base(), family=family.name, denoiser=denoiser)
    config = TrainConfig(resolution=pixels)
    warnings = Run(base, small_subject(resolution=pixels), None, config, tmp_path, torch.device("cpu")).warnings
    native = family.default_resolution[0]
    assert [
        f"{pixels} px is far below the {native} px that {family.name} was trained at" in one for one in warnings
    ] == [True] * warned


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = str(tmp_path)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, home)
    options = parser().parse_args(
        ["--base=~/a.safetensors", "--photos=~/photos", "--class-word=dog", "--output_dir=~/out"]
    )
    assert [options.base, options.photos, options.output_dir] == [
        tmp_path / "a.safetensors",
        tmp_path / "photos",
        tmp_path / "out",
    ]
    cleaning = clean_command.parser().parse_args(["--output_dir=~/out", "--loras=~/loras"])
    assert [cleaning.output_dir, *cleaning.loras] == [tmp_path / "out", tmp_path / "loras"]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["--preservation", "teacher"], "teacher"),
        (["--preservation", "teacher", "--num_class_images", "1"], "teacher"),
        (["--preservation", "none", "--num_class_images", "1"], "none"),
    ],
)
def test_the_way_to_keep_the_class_is_an_option(
    arguments: Callable[..., list[str]], tmp_path: Path, given: list[str], name: str, capsys: Any
) -> None:
    """Class images are only made for a way that uses them."""
    assert shell.main(arguments("--resolution", "64", "--steps", "2", *given)) == 0
    assert read_metadata(tmp_path / "out" / "my_subject.safetensors")["subjectbooth.preservation"] == name
    made = list((tmp_path / "out").glob("class_images/*/*.safetensors"))
    assert bool(made) == (name == "teacher" and "--num_class_images" in given)
    assert ("uses no class images" in capsys.readouterr().err) == (name == "none")


def test_class_images_as_the_way_need_a_number_of_them(arguments: Callable[..., list[str]], capsys: Any) -> None:
    assert shell.main(arguments("--preservation", "class_images", "--base", "not there")) == 2
    assert "Use --num_class_images 24, or --preservation curvature" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--masked_loss"], "masked_loss without a mask"),
        (["--rank", "64"], "rank 64. Required: 32 or less"),
        (["--output_name", "blocked/x"], "The LoRA cannot be written"),
        (["--output_name", "~/x"], "leaves the LoRA folder"),
    ],
)
def test_what_training_would_refuse_is_refused_before_class_images_are_drawn(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: list[str],
    sentence: str,
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "blocked").write_bytes(b"")
    assert shell.main(arguments("--resolution", "64", "--num_class_images", "2", *wrong)) == 2
    assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["blocked"]
