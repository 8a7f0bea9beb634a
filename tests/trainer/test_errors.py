"""What an error reads like, and which installed versions count as too old."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import pytest

from subjectbooth.trainer.errors import SubjectBoothError, require


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        # A setting keeps its spelling, and is not named twice.
        (("resolution 500", "a multiple of 8", "use 496", "resolution"),
         "resolution 500. Required: a multiple of 8. Use 496."),
        (("lora_name 'x'", "a file", "choose again", "lora_name"), "lora_name 'x'. Required: a file. Choose again."),
        (("dog.png is too small", "32 pixels", "use a larger one", "dog.png"),
         "dog.png is too small. Required: 32 pixels. Use a larger one."),
        # In whatever case it is named.
        (("a model without attention", "a UNet", "wire another model", "MODEL"),
         "A model without attention. Required: a UNet. Wire another model."),
        # A part of another word does not name it.
        (("the subject's model_a", "a clip", "clip it", "lip"),
         "The subject's model_a. Required: a clip. Clip it. Where: lip"),
        (("a damaged file", "the file as written", "delete it", "/a b/(1).bin"),
         "A damaged file. Required: the file as written. Delete it. Where: /a b/(1).bin"),
        (("a lock", "none", "wait. Or stop it", ""), "A lock. Required: none. Wait. Or stop it."),
        (("no photos", "3 to 5", "did you mean a folder?", ""), "No photos. Required: 3 to 5. Did you mean a folder?"),
    ],
)  # fmt: skip
def test_message(parts: tuple[str, str, str, str], message: str) -> None:
    error = SubjectBoothError(*parts)
    assert str(error) == message
    assert (error.given, error.needed, error.todo, error.where) == parts


@pytest.fixture
def with_version(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda version: monkeypatch.setattr(importlib.metadata, "version", lambda name: version)


@pytest.mark.parametrize("version", ["0.31.0", "0.31.0.dev1", "0.31.0rc1", "0.31", "0.31.0+local", "0.100.0", "1.0a0"])
def test_a_prerelease_counts_as_its_release(with_version: Callable[[str], None], version: str) -> None:
    with_version(version)
    assert require("diffusers")[0].__name__ == "diffusers"


@pytest.mark.parametrize("version", ["0.30.9", "0.30.9.post1", "0.9", "0.30.0.dev1"])
def test_an_older_version_is_refused(with_version: Callable[[str], None], version: str) -> None:
    with_version(version)
    with pytest.raises(SubjectBoothError) as refused:
        require("diffusers")
    assert str(refused.value).startswith(
        f"diffusers {version} is installed, which is too old. Required: diffusers 0.31"
    )
