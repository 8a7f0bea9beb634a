"""A checkpoint from when every text layer had a LoRA resumes with those that still have one."""

from __future__ import annotations

import torch
from torch import nn

from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.learn import adapter
from subjectbooth.trainer.learn.checkpoint import Checkpoint
from subjectbooth.trainer.learn.old_checkpoints import without_unused_layers

CONFIG = TrainConfig(rank=2, network_alpha=2.0)
PREFIXES = ("unet", "lora_te1", "lora_te2")


class _Text(nn.Module):
    """Four layers, named as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(4, 4)}) for _ in range(4))


def _built(text_layers: int) -> tuple[dict[str, nn.Module], list[nn.Parameter]]:
    """Network and two text encoders, of which so many layers have a LoRA; and the parameters in order."""
    modules: dict[str, nn.Module] = {"unet": nn.Sequential(nn.Linear(4, 4)), "lora_te1": _Text(), "lora_te2": _Text()}
    parameters = adapter.inject(modules["unet"], CONFIG, {"0": modules["unet"][0]})  # type: ignore[index]
    for prefix in PREFIXES[1:]:
        text = modules[prefix]
        layers = {f"encoder.layers.{n}.fc1": text.encoder.layers[n].fc1 for n in range(text_layers)}  # type: ignore
        parameters += adapter.inject(text, CONFIG, layers)
    return modules, parameters


def _checkpoint(modules: dict[str, nn.Module], parameters: list[nn.Parameter], trained: set[int]) -> Checkpoint:
    adapters = {
        f"{prefix}/{name}": tensor
        for prefix, module in modules.items()
        for name, tensor in adapter.adapter_state(module).items()
    }
    optimizer = {number: {"step": float(number)} for number in trained}
    return Checkpoint(3, adapters, optimizer, [], {}, average=[parameter.detach() for parameter in parameters])


def test_layers_without_a_lora_are_dropped_and_the_others_renumbered() -> None:
    modules, parameters = _built(4)
    # Two parameters for the network and for each layer; the last layer of each text encoder never had a gradient.
    unused = {8, 9, 16, 17}
    old = _checkpoint(modules, parameters, set(range(len(parameters))) - unused)
    now, _ = _built(3)
    read = without_unused_layers(old, now)
    assert set(read.adapter) == {
        f"{prefix}/{name}" for prefix in PREFIXES for name in adapter.adapter_state(now[prefix])
    }
    kept = [number for number in range(len(parameters)) if number not in unused]
    assert {new: state["step"] for new, state in read.optimizer.items()} == dict(enumerate(map(float, kept)))
    assert all(torch.equal(mean, parameters[number]) for mean, number in zip(read.average, kept, strict=True))


def test_a_checkpoint_of_today_stays_as_it_is() -> None:
    modules, parameters = _built(3)
    today = _checkpoint(modules, parameters, set(range(len(parameters))))
    assert without_unused_layers(today, modules) is today
