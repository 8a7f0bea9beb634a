"""Across versions of ComfyUI: an update changes no run, and the pack uses nothing that ComfyUI is about to take away.

SUBJECTBOOTH_OTHER_COMFYUI names a second ComfyUI to compare with (`make test-newest` sets it). Weights are compared
only there, on one machine: their last bits depend on its CPU. Keys do not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.comfy_server import ComfyClient, ComfyServer, RunResult
from subjectbooth.tests.nodes.graphs import Graph, node
from subjectbooth.tests.nodes.training_graphs import train_and_sample, upload_cat
from subjectbooth.trainer.files.storage import sha256_of

OTHER = os.environ.get("SUBJECTBOOTH_OTHER_COMFYUI")

CHECKPOINT = "58883174da988dd9a2c540210f89dc6db7a7643ccafbf845b70390d6d0d28b2f"
"""Digest of the tiny checkpoint that the key was recorded with: torch draws it, not on every machine the same."""
RUN = "ohwx_cat_32e4d33d72fe"
"""The run's folder, which its key names. It is the same as long as nobody's finished runs are trained again."""


def _graph(comfy: ComfyClient, *, styled: bool) -> Graph:
    """Class images, training and sampling; `styled`: on a base with a style LoRA, whose text encoder is trained too."""
    base: dict[str, Any] = {"model": ("8", 0), "clip": ("8", 1)} if styled else {}
    graph = train_and_sample(
        upload_cat(comfy),
        seed=1,
        apply=base,
        steps=2,
        learning_rate=0.0017,
        output_name="versions_styled" if styled else "versions",
        **base,
    )
    wired = {name: list(link) for name, link in base.items()} or {"model": ["1", 0], "clip": ["1", 1]}
    graph["20"] = node(
        "GenerateClassPriors",
        **wired,
        vae=["1", 2],
        subject=["10", 0],
        class_prompt="a photo of a {class}",
        negative="",
        count=1,
        steps=1,
        cfg=2.0,
        sampler_name="euler",
        scheduler="normal",
        seed=2600,
        batch_size=1,
        exclude="",
    )
    if styled:
        graph["8"] = node(
            "LoraLoader",
            model=["1", 0],
            clip=["1", 1],
            lora_name="tiny_style.safetensors",
            strength_model=0.7,
            strength_clip=0.7,
        )
        graph["11"]["inputs"] |= {"class_priors": ["20", 0], "preservation": "class_images"}
        options = {**comfy.defaults("DreamBoothOptions"), "train_text_encoder": True}
        graph["13"] = node("DreamBoothOptions", **options)
        graph["11"]["inputs"]["options"] = ["13", 0]
    return graph


def _run_name(result: RunResult) -> str:
    return str(result.outputs["11"]["subjectbooth"][0]["run"])


def test_the_same_training_is_found_again_after_an_update(comfy: ComfyClient, tiny_checkpoint: Path) -> None:
    if sha256_of(tiny_checkpoint) != CHECKPOINT:
        pytest.skip("torch draws another tiny checkpoint on this machine than where the key was recorded")
    assert _run_name(comfy.run(_graph(comfy, styled=False))) == RUN


@pytest.mark.parametrize(("steps", "said"), [(1, "trained"), (2, "reused")])
def test_a_run_that_was_begun_on_a_copy_of_the_model_goes_on_there(comfy: ComfyClient, steps: int, said: str) -> None:
    """As earlier versions did with Stable Diffusion."""
    graph = _graph(comfy, styled=False)
    graph["11"]["inputs"] |= {"seed": 4100 + steps, "output_name": "on a copy"}
    wired = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "subject": ["10", 0]}
    plain = {name: value for name, value in graph["11"]["inputs"].items() if not isinstance(value, list)}
    begun = {**graph, "90": node("ProbeRunOnACopy", **wired, inputs=json.dumps(plain), steps=steps)}
    before = comfy.run(begun, targets=("90",)).outputs["90"]["report"][0]["run"]
    found = comfy.run(graph, targets=("11",))
    assert _run_name(found) == before and found.outputs["11"]["text"][0].startswith(said)


def test_nothing_that_comfyui_calls_deprecated_is_used(comfy: ComfyClient) -> None:
    before = len(comfy.server.log())
    comfy.run(_graph(comfy, styled=True))
    # Packages warn of each other's ways, too.
    lines = [line for line in comfy.server.log()[before:].splitlines() if "site-packages" not in line]
    assert len(lines) > 3
    assert not [line for line in lines if re.search("deprecat|has moved", line, re.IGNORECASE)]


@pytest.mark.skipif(not OTHER, reason="SUBJECTBOOTH_OTHER_COMFYUI names no second ComfyUI")
def test_another_comfyui_trains_the_same(comfy: ComfyClient, comfy_factory: Callable[..., ComfyServer]) -> None:
    found = []
    with comfy_factory(tree=Path(str(OTHER))) as server, ComfyClient(server.url, server) as other:
        for client in (comfy, other):
            results = [client.run(_graph(client, styled=styled)) for styled in (False, True)]
            loras = client.server.models_dir / "loras"
            tensors = [
                safetensors.torch.load_file(loras / f"{name}.safetensors") for name in ("versions", "versions_styled")
            ]
            made = [(_run_name(result), result.outputs["20"]["hashes"]) for result in results]
            found.append((made, tensors))
    (made, ours), (others, theirs) = found
    assert made == others, "the same runs, the same class images"
    for one, same in zip(ours, theirs, strict=True):
        assert list(one) == list(same)
        assert all(torch.equal(one[name], same[name]) for name in one)
