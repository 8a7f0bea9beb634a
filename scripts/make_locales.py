"""Generate locales/en/nodeDefs.json from the nodes' strings, and list what the other languages lack.

python scripts/make_locales.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from comfy_server import FP32_FLAGS, ComfyClient, ComfyServer
from setup_env import CACHE, ROOT, ensure_environment

LOCALES = ROOT / "locales"
UNTRANSLATED = {"images", "folder", "sample", "lora_name", "sampler_name", "scheduler"}
"""Inputs whose options are file names or ComfyUI's own names."""


def main() -> int:
    environment = ensure_environment()
    server = ComfyServer(
        environment.comfyui,
        CACHE / "locales",
        packs={"SubjectBooth": ROOT},
        args=[*FP32_FLAGS, "--disable-api-nodes"],
        python=environment.python,
    )
    with server, ComfyClient(server.url, server, listen=False) as client:
        definitions = client.object_info()
    words = node_words(definitions)
    text = json.dumps(words, ensure_ascii=False, indent=1)
    (LOCALES / "en" / "nodeDefs.json").write_text(text + "\n", encoding="utf-8")
    lacking = 0
    for path in sorted(LOCALES.glob("*/nodeDefs.json")):
        for key in sorted(_paths(words) - _paths(json.loads(path.read_text(encoding="utf-8")))):
            print(f"{path.parent.name} lacks {key}")
            lacking += 1
    return 1 if lacking else 0


def node_words(definitions: dict[str, Any]) -> dict[str, Any]:
    """The nodes' names, descriptions and tooltips, in the format of the front end's nodeDefs.json.

    Args:
        definitions: the response of /object_info; only nodes of the category SubjectBooth are used.
    """
    words: dict[str, Any] = {}
    for kind, info in sorted(definitions.items()):
        if info["category"] != "SubjectBooth":
            continue
        entry: dict[str, Any] = {"display_name": info["display_name"], "description": info["description"]}
        inputs = {}
        for group in ("required", "optional"):
            for name, spec in info["input"].get(group, {}).items():
                about = spec[1] if len(spec) > 1 else {}
                inputs[name] = {"name": about.get("display_name") or name, "tooltip": about.get("tooltip", "")}
                if spec[0] == "COMBO" and name not in UNTRANSLATED:
                    inputs[name]["options"] = {option: option for option in about["options"]}
        if inputs:
            entry["inputs"] = inputs
        tips = info.get("output_tooltips") or [""] * len(info["output"])
        pairs = zip(info["output_name"], tips, strict=True)
        entry["outputs"] = {str(index): {"name": name, "tooltip": tip} for index, (name, tip) in enumerate(pairs)}
        words[kind] = entry
    return words


def _paths(words: Any, at: str = "") -> set[str]:
    """The paths of all texts in a nested dict ("Node.inputs.steps.tooltip"); empty texts count as missing."""
    if not isinstance(words, dict):
        return {at} if words else set()
    return {path for key, value in words.items() for path in _paths(value, f"{at}.{key}" if at else key)}


if __name__ == "__main__":
    sys.exit(main())
