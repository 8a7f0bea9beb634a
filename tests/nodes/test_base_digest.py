"""The base's digest says what was loaded, not what happened to lie in memory."""

from __future__ import annotations

from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.nodes.graphs import node


def digest(comfy: ComfyClient, fill: float, **clip_layer: int) -> str:
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "2": node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-1, **clip_layer),
        "3": node("ProbeBaseDigest", model=["1", 0], clip=["2", 0], vae=["1", 2], fill=fill),
    }
    return str(comfy.run(graph).outputs["3"]["report"][0]["digest"])


def test_weights_that_no_checkpoint_holds_do_not_count(comfy: ComfyClient) -> None:
    """SD 1.x has no text projection; ComfyUI makes one of whatever is in memory, another at each load."""
    first = digest(comfy, 0.25)
    assert digest(comfy, -3.0) == first
    comfy.free()
    assert digest(comfy, 0.5) == first
