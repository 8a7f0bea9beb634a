"""A custom node pack without nodes: watches the training in a ComfyUI that the benchmark has started."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

NODE_CLASS_MAPPINGS: dict[str, Any] = {}

ROOT = Path(__file__).resolve().parent.parent.parent
package = types.ModuleType("subjectbooth")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("subjectbooth", package)


def _watch(settings: dict[str, Any]) -> None:
    from server import PromptServer

    from subjectbooth.benchmarks.recorder import Recorder, measure_comfyui, measure_ours
    from subjectbooth.benchmarks.scene import Scene

    recorder = Recorder(
        Scene.from_json(settings["scene"]), Path(settings["out"]), settings["counts"], settings["started"]
    )
    measured: list[bool] = []

    def on_prompt(prompt: Any) -> Any:
        """All packs are loaded by now."""
        if not measured:
            measured.append(True)
            measure_comfyui(recorder.parts)
            measure_ours(recorder.parts)
            recorder.start_parts()
        return prompt

    PromptServer.instance.add_on_prompt_handler(on_prompt)


if "SUBJECTBOOTH_BENCHMARK" in os.environ:
    _watch(json.loads(os.environ["SUBJECTBOOTH_BENCHMARK"]))
