"""The translations name every node, input and output there is, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.scripts.comfy_server import ComfyClient

LOCALES = Path(__file__).resolve().parents[2] / "locales"


@pytest.mark.parametrize("language", ["ru"])
def test_everything_is_translated(comfy: ComfyClient, language: str) -> None:
    words: dict[str, Any] = json.loads((LOCALES / language / "nodeDefs.json").read_text("utf-8"))
    nodes = {name: info for name, info in comfy.object_info().items() if info["category"] == "SubjectBooth"}
    assert set(words) == set(nodes)
    for name, info in nodes.items():
        inputs = {key for kind in ("required", "optional") for key in info["input"].get(kind, {})}
        assert set(words[name].get("inputs", {})) == inputs, name
        assert set(words[name]["outputs"]) == {str(index) for index in range(len(info["output"]))}, name
        assert words[name]["display_name"] and words[name]["description"]
        entries = [*words[name].get("inputs", {}).values(), *words[name]["outputs"].values()]
        assert all(entry["name"] and entry["tooltip"] for entry in entries), name
    served = comfy.request("GET", "/i18n")[language]["nodeDefs"]
    assert served["DreamBoothLoRATrain"]["display_name"] == words["DreamBoothLoRATrain"]["display_name"]
