"""Tensors read one at a time from checkpoints, held against the safetensors library."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from subjectbooth.trainer.base.stored.tensors import StoredTensors
from subjectbooth.trainer.errors import SubjectBoothError

KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
         torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)  # fmt: skip


def _write(path: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    tensors = {str(kind): (torch.randn(3, 5, generator=random) * 9).to(kind) for kind in KINDS}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "odd": torch.ones(7, dtype=torch.uint8)}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return tensors


def test_every_kind_of_tensor_is_what_the_library_reads(tmp_path: Path) -> None:
    paths = [tmp_path / "мой.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(paths):
        _write(path, seed)
    safetensors.torch.save_file({"own": torch.ones(2)}, paths[0].with_name("c.safetensors"))
    stored = StoredTensors.open([paths[0], paths[0].with_name("c.safetensors")])
    expected = safetensors.torch.load_file(paths[0]) | {"own": torch.ones(2)}
    assert set(stored) == set(expected)
    for name, tensor in expected.items():
        read = stored[name]
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert read.view(torch.uint8 if read.dim() else read.dtype).equal(
            tensor.view(torch.uint8 if read.dim() else read.dtype)
        )
    read = stored["scalar"]
    assert read.add_(1) != stored["scalar"], "what is done to a tensor reaches the file"


def test_another_file_under_the_name_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    _write(path)
    stored = StoredTensors.open([path])
    _write(tmp_path / "other", seed=1)
    os.replace(tmp_path / "other", path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(SubjectBoothError, match="changed while it was read"):
        stored["scalar"]
    path.unlink()
    with pytest.raises(SubjectBoothError, match="The checkpoint was not found"):
        stored["scalar"]
