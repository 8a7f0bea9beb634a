"""Reads untrusted LoRA files: returns tensors and metadata, or rejects the file with a clear message."""

from __future__ import annotations

from pathlib import Path

import torch

from ..base.stored.tensors import StoredTensors
from ..errors import SubjectBoothError
from ..files.safetensors_file import read_metadata
from ..topics import Topic
from .diffusers_names import with_kohya_names

MAX_WORDS = 200
"""Maximum characters of the trigger words; a prompt holds about 300."""

MAX_CONFIG = 1 << 20
"""Maximum bytes of the PEFT settings; usually there are about 1,000."""

MAX_DIMENSIONS = 5
"""Maximum dimensions of a layer's weights: a convolution over time, height and width has five."""


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read tensors and metadata of a LoRA file. Only safetensors is accepted; nothing is ever unpickled.

    The file is read, not memory-mapped, so that it can be replaced while its tensors are in use (Windows locks mapped
    files). Names of diffusers and PEFT are converted to kohya's, see :mod:`trainer.runs.diffusers_names`.

    Raises:
        SubjectBoothError: the file has another format, is damaged or empty, or contains NaN or infinity.
    """
    if path.suffix.lower() != ".safetensors":
        raise SubjectBoothError(
            f"the LoRA file has the format {path.suffix or '(none)'}",
            "a .safetensors file",
            "convert it, or use another LoRA loader",
            path.name,
            Topic.LORA_FORMAT,
        )
    import safetensors.torch

    try:
        metadata = read_metadata(path)  # first, because it rejects an oversized header before reading it
        tensors = safetensors.torch.load(path.read_bytes())
    except SubjectBoothError:
        raise
    except OSError as error:
        raise SubjectBoothError(
            f"the LoRA file cannot be opened ({error.strerror or type(error).__name__})",
            "a readable file",
            "check that the file exists, and its permissions",
            path.name,
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise SubjectBoothError(
            f"the LoRA file is damaged ({type(error).__name__})",
            "a complete safetensors file",
            "download or copy the file again",
            path.name,
        ) from error
    if not tensors:
        raise SubjectBoothError("the file contains no tensors", "a LoRA", "choose another file", path.name)
    for name, tensor in tensors.items():
        if tensor.dim() > MAX_DIMENSIONS:  # from 65 on, torch fails wherever the tensor is first used
            raise SubjectBoothError(
                f"the tensor {name[:100]!r} has {tensor.dim()} dimensions",
                f"a LoRA, whose tensors have at most {MAX_DIMENSIONS}",
                "choose another file",
                path.name,
            )
        # isfinite does not support float8.
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise SubjectBoothError(
                f"the tensor {name[:100]!r} contains NaN or infinity",
                "finite numbers",
                "download the file again, or use a LoRA from an earlier step",
                path.name,
            )
    return with_kohya_names(tensors, metadata, _peft_config(path)), metadata


def peft_config_path(path: Path) -> Path | None:
    """Path of the PEFT settings, which PEFT saves next to its LoRA file; None if there are none."""
    config = path.with_name("adapter_config.json")
    return config if path.name == "adapter_model.safetensors" and config.is_file() else None


def _peft_config(path: Path) -> str:
    config = peft_config_path(path)
    if config is None:
        return ""
    try:
        with config.open("rb") as file:
            return file.read(MAX_CONFIG).decode("utf-8")  # truncated settings are rejected as invalid JSON
    except (OSError, ValueError) as error:
        raise SubjectBoothError(
            f"the PEFT settings cannot be read ({type(error).__name__})",
            "settings as written by PEFT",
            "download the file again",
            config.name,
        ) from error


def is_untrained(path: Path) -> bool:
    """Whether an adapter of ours has no effect: every ``lora_up`` or ``lora_B`` is zero, as before the first step."""
    stored = StoredTensors.open([path])
    return not any(bool(stored[name].any()) for name in stored if name.endswith((".lora_up.weight", ".lora_B.weight")))


def trigger_words(metadata: dict[str, str]) -> str:
    """The trigger words from the metadata; empty if there are none, or if they are too long or unprintable."""
    words = metadata.get("subjectbooth.trigger") or metadata.get("modelspec.trigger_phrase", "")
    return words.strip() if len(words) <= MAX_WORDS and words.isprintable() else ""
