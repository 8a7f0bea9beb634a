"""The plan of a run's memory in the real ComfyUI: shown on the node, and what was chosen because of it is kept."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors

from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.nodes.graphs import node
from subjectbooth.tests.nodes.training_graphs import subject_node, train_node, upload_cat
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.learn import checkpoint

PLAN = re.compile(
    r"plan: base ([\d.]+) \+ adapter ([\d.]+) \+ optimizer ([\d.]+) \+ activations ([\d.]+) = ([\d.]+) "
    r"of ([\d.]+) GB free; fp32, adamw, checkpointing (on|off), 2 images in micro-batches of (\d)"
)


@contextmanager
def _free(client: ComfyClient, count: int) -> Iterator[None]:
    """Inside, ComfyUI says that so many bytes are free."""
    client.run({"1": node("ProbeFreeMemory", free=count)})
    try:
        yield
    finally:
        client.run({"1": node("ProbeFreeMemory", free=0)})


@dataclasses.dataclass
class Told:
    """What one run told, and what it left."""

    plan: re.Match[str]
    text: str
    message: dict[str, Any]
    history: dict[str, Any]
    folder: Path
    metadata: dict[str, str]
    weights: int

    @property
    def figures(self) -> list[float]:
        return [float(figure) for figure in self.plan.groups()[:6]]

    @property
    def kept(self) -> tuple[list[str], list[str]]:
        """Gradient checkpointing and pictures at once, of the resume file and of the LoRA's metadata."""
        names = ("gradient_checkpointing", "pictures_per_forward")
        chosen = checkpoint.load(self.folder / "checkpoint.safetensors").chosen
        return [chosen[name] for name in names], [self.metadata[f"subjectbooth.{name}"] for name in names]


def _train(client: ComfyClient, name: str, **changes: Any) -> Told:
    train = train_node(rank=256, train_batch_size=2, resolution=128, output_name=name, **changes)
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(client)),
        "11": train,
    }
    result = client.run(graph)
    (text,) = [
        str(event.data["text"])
        for event in result.of_type("progress_text")
        if event.data["node"] == "11" and "plan: " in str(event.data["text"])
    ]
    plan = PLAN.search(text)
    assert plan is not None, text
    assert plan[0] in result.outputs["11"]["text"], "it stays with the node's result"
    (message,) = [event.data for event in result.of_type("subjectbooth.train") if "chosen" in event.data]
    path = client.server.models_dir / "loras" / f"{name}.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        weights = sum(4 * math.prod(file.get_slice(key).get_shape()) for key in file.keys() if key.endswith(".weight"))
        metadata = file.metadata()
    return Told(
        plan,
        text,
        message,
        client.request("GET", f"/subjectbooth/runs/{message['run']}/events"),
        client.server.output_dir / "subjectbooth" / message["run"],
        metadata,
        weights,
    )


def test_the_plan_is_shown_with_what_auto_chose_which_the_files_keep(comfy: ComfyClient, tiny_checkpoint: Path) -> None:
    with safetensors.safe_open(tiny_checkpoint, "pt") as file:
        base = sum(
            4 * math.prod(file.get_slice(key).get_shape())
            for key in file.keys()
            if key.startswith("model.diffusion_model.")
        )
    with _free(comfy, 1):
        little = _train(comfy, "little", learning_rate=0.0061, steps=2)
    assert little.plan.groups()[6:] == ("on", "1")
    # Adapter: weights and gradients. Optimizer: two numbers a weight. On a CPU the base is in memory already.
    trained = little.weights
    expected = [base, 2 * trained, 2 * trained, little.figures[3] * 1e9, 0, base]
    expected[4] = sum(expected[:4])
    assert little.figures == pytest.approx([count / 1e9 for count in expected], abs=0.011)
    assert min(little.figures) >= 0.01
    assert "this will probably not fit" in little.text
    assert little.message["notes"][0] == little.history["notes"][0] == little.plan[0]
    for chosen in (little.message["chosen"], little.history["chosen"]):
        assert (chosen["gradient_checkpointing"], chosen["pictures_per_forward"]) == ("on", "1")
        assert (chosen["precision"], chosen["optimizer"]) == ("fp32", "adamw")
    assert little.kept == (["on", "1"], ["on", "1"])
    assert (little.metadata["subjectbooth.precision"], little.metadata["ss_gradient_checkpointing"]) == ("fp32", "True")

    # With all of the memory the same run goes on, and keeps its first choice; another run chooses anew.
    further = _train(comfy, "further", learning_rate=0.0061, steps=3)
    assert further.folder == little.folder
    assert further.history["step"] == 3
    assert further.plan.groups()[6:] == ("on", "1")
    assert further.kept == (["on", "1"], ["on", "1"])
    assert further.figures[5] > little.figures[5]
    much = _train(comfy, "much", learning_rate=0.0062, steps=2)
    assert much.plan.groups()[6:] == ("off", "2")
    assert much.kept == (["off", "2"], ["off", "2"])
    assert much.figures[:3] == little.figures[:3]
    assert much.figures[3] > little.figures[3]

    # The key holds what was asked: the same words in other memory, and another run where fp32 was asked for.
    record = json.loads((little.folder / "run.json").read_text("utf-8"))
    assert record["key"] == little.metadata["subjectbooth.run_key"] == further.metadata["subjectbooth.run_key"]
    asked = TrainConfig.from_json(record["config"])
    assert (asked.precision, asked.gradient_checkpointing, asked.pictures_per_forward) == ("auto", "auto", 0)
    explicit = _train(comfy, "explicit", learning_rate=0.0062, steps=2, precision="fp32")
    assert explicit.folder != much.folder
    assert explicit.plan[0].split("=")[0] == much.plan[0].split("=")[0]
