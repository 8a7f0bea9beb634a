"""Convert training states to the compact weights and manifest in the repo, and back."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..base import MANIFEST, WEIGHTS, read_packed, sha256_of, write_checkpoint
from ..expand import narrow_state, pack_state
from . import files

logger = logging.getLogger("subjectbooth")


class _Sink(io.RawIOBase):
    """A stream that discards its data, because the checkpoint is only hashed here."""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        return memoryview(data).nbytes  # type: ignore[arg-type]


def pack(work: Path, diffusion: str, autoencoder: str) -> None:
    """Write demo/weights from the EMA weights of one run and the autoencoder of another."""
    nets = torch.load(work / f"{diffusion}.pt", weights_only=True)["ema"]
    vae = torch.load(work / f"{autoencoder}.pt", weights_only=True)["nets"]
    narrow = {**nets, **{f"vae.{key}": value for key, value in vae.items()}}
    packed = pack_state(narrow)
    WEIGHTS.parent.mkdir(exist_ok=True)
    with files.atomic_path(WEIGHTS) as part:
        save_file(packed, part)
    digest = write_checkpoint(packed, _Sink())  # type: ignore[arg-type]
    recorded = {"weights": sha256_of(WEIGHTS), "checkpoint": digest}
    with files.atomic_path(MANIFEST) as part:
        part.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    logger.info("%s: %.1f MB", WEIGHTS.name, WEIGHTS.stat().st_size / 1e6)


def unpack(work: Path, diffusion: str, autoencoder: str, later: Sequence[str] = (), weights: Path = WEIGHTS) -> None:
    """Create training states from packed weights, to continue training elsewhere (`demo.making.build unpack`).

    A run ends with a learning rate near zero, so only the averaged weights matter: the next run warms up from them with
    a new optimizer.

    Args:
        weights: what :func:`pack` wrote; those in the repo if not given.
        later: runs that go on from these; their states, left by another training, would be taken for these ones'.

    Raises:
        FileExistsError: one of the states already exists.
    """
    for name in (diffusion, autoencoder, *later):
        if (path := work / f"{name}.pt").exists():
            raise FileExistsError(f"{path} already exists; move it away to start from {weights}")
    state = narrow_state(read_packed(weights))
    nets = {key: value for key, value in state.items() if not key.startswith("vae.")}
    vae = {key.removeprefix("vae."): value for key, value in state.items() if key.startswith("vae.")}
    work.mkdir(parents=True, exist_ok=True)
    for name, saved in {diffusion: {"nets": nets, "ema": nets}, autoencoder: {"nets": vae}}.items():
        torch.save({**saved, "step": 0, "spent": 0.0}, work / f"{name}.pt")
