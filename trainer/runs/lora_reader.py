"""Reading a LoRA file, which may be a stranger's: only numbers and words come out of it, or one sentence."""

from __future__ import annotations

from pathlib import Path

import torch

from ..base.stored.tensors import StoredTensors
from ..errors import SubjectBoothError
from ..files.safetensors_file import read_metadata
from ..topics import Topic
from .diffusers_names import with_kohya_names

MAX_WORDS = 200
"""Characters of trigger words: a prompt holds about 300, and a file may claim anything."""

MAX_CONFIG = 1 << 20
"""Bytes of PEFT's settings, which usually are one thousand."""

MAX_DIMENSIONS = 5
"""Of a layer's weights: a convolution over time, height and width has five."""


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file. Only safetensors: nothing here ever unpickles.

    The file is read, not mapped, so that it can be replaced while its tensors are in use (Windows locks mapped files).
    Tensors that diffusers or PEFT named get kohya's names, see :mod:`trainer.runs.diffusers_names`.

    Raises:
        SubjectBoothError: it is of another format, damaged, empty, or holds values that are not numbers.
    """
    if path.suffix.lower() != ".safetensors":
        raise SubjectBoothError(
            f"a LoRA file of the format {path.suffix or '(none)'}",
            "a .safetensors file",
            "convert it, or use another LoRA loader",
            path.name,
            Topic.LORA_FORMAT,
        )
    import safetensors.torch

    try:
        metadata = read_metadata(path)  # first: it refuses a monstrous header before anything of it is read
        tensors = safetensors.torch.load(path.read_bytes())
    except SubjectBoothError:
        raise
    except OSError as error:
        raise SubjectBoothError(
            f"a LoRA file that cannot be opened ({error.strerror or type(error).__name__})",
            "a readable file",
            "check that it is there, and its permissions",
            path.name,
        ) from error
    except Exception as error:  # whatever a damaged file does to its reader
        raise SubjectBoothError(
            f"a LoRA file that cannot be read ({type(error).__name__})",
            "a whole safetensors file",
            "get the file again",
            path.name,
        ) from error
    if not tensors:
        raise SubjectBoothError("a file without a single tensor", "a LoRA", "choose another file", path.name)
    for name, tensor in tensors.items():
        if tensor.dim() > MAX_DIMENSIONS:  # torch itself fails from 65 on, wherever the tensor is first used
            raise SubjectBoothError(
                f"a tensor of {tensor.dim()} dimensions, {name[:100]!r}",
                f"a LoRA's layers, of {MAX_DIMENSIONS} at most",
                "choose another file",
                path.name,
            )
        # float8 has no isfinite; widened it does.
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise SubjectBoothError(
                f"values that are not finite numbers in {name[:100]!r}",
                "an undamaged LoRA",
                "get the file again, or take one of an earlier step",
                path.name,
            )
    return with_kohya_names(tensors, metadata, _peft_config(path)), metadata


def peft_config_path(path: Path) -> Path | None:
    """PEFT's settings of a LoRA file, which PEFT keeps in a file next to it; None where there are none."""
    config = path.with_name("adapter_config.json")
    return config if path.name == "adapter_model.safetensors" and config.is_file() else None


def _peft_config(path: Path) -> str:
    config = peft_config_path(path)
    if config is None:
        return ""
    try:
        with config.open("rb") as file:
            return file.read(MAX_CONFIG).decode("utf-8")  # what was cut is no JSON
    except (OSError, ValueError) as error:
        raise SubjectBoothError(
            f"PEFT settings that cannot be read ({type(error).__name__})",
            "settings as PEFT writes them",
            "get the file again",
            config.name,
        ) from error


def is_untrained(path: Path) -> bool:
    """Whether an adapter in kohya's layout changes nothing: every ``lora_up`` is zero, as before the first step."""
    stored = StoredTensors.open([path])
    return not any(bool(stored[name].any()) for name in stored if name.endswith(".lora_up.weight"))


def trigger_words(metadata: dict[str, str]) -> str:
    """The words that a file says it was trained with; empty when it says none, or something no prompt can hold."""
    words = metadata.get("subjectbooth.trigger") or metadata.get("modelspec.trigger_phrase", "")
    return words.strip() if len(words) <= MAX_WORDS and words.isprintable() else ""
