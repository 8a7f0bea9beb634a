"""The base's digest says what was loaded, not what happened to lie in memory."""

from __future__ import annotations

from typing import Any

import pytest

from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.nodes.graphs import node


def report(comfy: ComfyClient, fill: float, edit: str = "", **clip_layer: int) -> dict[str, Any]:
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "2": node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-1, **clip_layer),
        "3": node("ProbeBaseDigest", model=["1", 0], clip=["2", 0], vae=["1", 2], fill=fill, edit=edit),
    }
    found: dict[str, Any] = comfy.run(graph).outputs["3"]["report"][0]
    return found


def test_weights_that_no_checkpoint_holds_do_not_count(comfy: ComfyClient) -> None:
    """SD 1.x has no text projection; ComfyUI makes one of whatever is in memory, another at each load."""
    first = report(comfy, 0.25)["digest"]
    assert report(comfy, -3.0)["digest"] == first
    comfy.free()
    assert report(comfy, 0.5)["digest"] == first


@pytest.mark.parametrize("weight", ["token_embedding.weight", "encoder.layers.0.mlp.fc1.weight"])
def test_a_base_is_hashed_once_and_again_when_it_has_changed(comfy: ComfyClient, weight: str) -> None:
    """Also after ComfyUI has loaded it again or was restarted: the probe forgets what the process knows."""
    edit = f"clip_l.transformer.text_model.{'embeddings.' if 'token' in weight else ''}{weight}"
    first, again = report(comfy, 1.0), report(comfy, 2.0)
    assert again == {"digest": first["digest"], "hashed": 0}
    edited = report(comfy, 1.0, edit)
    assert edited["digest"] != first["digest"] and edited["hashed"] > 0
    assert report(comfy, 3.0) == again
