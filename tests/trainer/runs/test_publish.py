"""A finished adapter gets its name among the LoRAs, and nobody's file is ever lost by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from subjectbooth.trainer.files.safetensors_file import Serialized, read_metadata
from subjectbooth.trainer.runs.publish import Published, publish

RUN = "5e" * 32


def _publish(folder: Path, value: float = 1.0, run: str = RUN, name: str = "pets/rex") -> Published:
    lora = folder / "run.safetensors"
    tensors = Serialized.of({"lora_unet_a.lora_up.weight": torch.full((2, 2), value)})
    metadata = {"subjectbooth.run_key": run, "subjectbooth.step": "5"}
    lora.write_bytes(b"".join(tensors.parts_with_checksum(metadata)))
    return publish(lora, folder / "loras", name)


def test_the_same_run_keeps_its_name(tmp_path: Path) -> None:
    first = _publish(tmp_path)
    assert (first.path, first.note) == (tmp_path / "loras" / "pets" / "rex.safetensors", "")
    content = first.path.read_bytes()
    assert _publish(tmp_path) == first
    assert first.path.read_bytes() == content
    later = _publish(tmp_path, value=2.0)  # trained on, or trained again on another machine
    assert later == first
    assert first.path.read_bytes() != content
    first.path.unlink()
    assert _publish(tmp_path) == first  # deleted, it comes back
    assert first.path.read_bytes() == content


def _edit(change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        tensors, metadata = safetensors.torch.load_file(path), read_metadata(path)
        change(tensors, metadata)
        safetensors.torch.save_file(tensors, path, metadata)

    return edit


EDITS: dict[str, Callable[[Path], object]] = {
    "a new entry": _edit(lambda _, metadata: metadata.update(note="my best")),
    "a changed entry": _edit(lambda _, metadata: metadata.update({"subjectbooth.step": "6"})),
    "a removed entry": _edit(lambda _, metadata: metadata.pop("subjectbooth.step")),
    "another title": _edit(lambda _, metadata: metadata.update({"modelspec.title": "Rex the dog"})),
    "changed weights": _edit(lambda tensors, _: tensors["lora_unet_a.lora_up.weight"].mul_(0.5)),
    "half precision": _edit(lambda tensors, _: tensors.update({name: one.half() for name, one in tensors.items()})),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("edit", list(EDITS))
def test_a_file_that_somebody_has_edited_is_never_overwritten(tmp_path: Path, edit: str) -> None:
    path = _publish(tmp_path).path
    EDITS[edit](path)
    edited = path.read_bytes()
    again = [_publish(tmp_path, value) for value in (1.0, 1.0, 2.0)]
    assert path.read_bytes() == edited
    assert {one.path.name for one in again} == {"rex_2.safetensors"}
    note = "rex.safetensors was edited after it was published and is kept: this LoRA is saved as rex_2.safetensors"
    assert {one.note for one in again} == {note}
    assert read_metadata(again[0].path)["ss_output_name"] == "rex_2"


def test_a_file_of_another_run_or_program_is_kept(tmp_path: Path) -> None:
    other = _publish(tmp_path, run="07" * 32).path
    content = other.read_bytes()
    mine = _publish(tmp_path)
    assert other.read_bytes() == content
    assert mine.path.name == "rex_2.safetensors"
    assert mine.note == "rex.safetensors is another LoRA and is kept: this one is saved as rex_2.safetensors"
    (tmp_path / "loras" / "max.safetensors").write_bytes(b"not a LoRA at all")
    assert _publish(tmp_path, name="max").path.name == "max_2.safetensors"
