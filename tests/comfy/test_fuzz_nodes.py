"""Random values on the inputs of LoadSubjectImages and GenerateClassPriors: a result or a sentence, never a mess.

SUBJECTBOOTH_FUZZ sets the number of cases (10,000 for the long mode), SUBJECTBOOTH_FUZZ_SEED repeats a run.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.scripts.comfy_server import ComfyClient, ComfyError, NodeFailed, PromptRejected
from subjectbooth.tests.comfy.graphs import Graph, node
from subjectbooth.tests.comfy.test_priors_node import priors_graph
from subjectbooth.tests.comfy.test_subject_node import refused_files, subject_graph

CASES = int(os.environ.get("SUBJECTBOOTH_FUZZ", "120"))
SEED = int(os.environ.get("SUBJECTBOOTH_FUZZ_SEED", "20261122"))

TEXTS = [
    "", " ", "dog", "{class}", "{token}", "{subject} {", "}{", "a (dog:1.5)", "embedding:x", "\\", "\0", "\ud800",
    "собака", "🐶" * 40, "x" * 5000, "..", "../..", "/etc/passwd", "C:\\x", "ok.png", "refused", "empty", "link",
    "with_link", "ok.png [output]", "ok.png [temp]", "%2e%2e%2f", "none", "null", "NaN", "\n", "a\nb", "{0.__class__}",
    "%s%n", "'; --", "0" * 64, "deadbeef", "<script>", "CON", "con.png", "~", ".", "./ok.png", "refused/ok.png",
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 7, 8, 63, 64, 65, 4096, 4104, 2**31, 2**63, 2**64 - 1, 2**64, -(2**63), 0.5, 1e300, -1e-300]
STRANGE = [None, True, False, float("nan"), float("inf"), -float("inf"), {}, {"a": 1}, {"__value__": []}]


def strange_value(choose: random.Random) -> Any:
    kind = choose.random()
    if kind < 0.5:
        return choose.choice(TEXTS)
    if kind < 0.8:
        return choose.choice(NUMBERS)
    if kind < 0.95:
        return choose.choice(STRANGE)
    # A text and a number would be a link to ComfyUI, and one to a missing node ends its worker thread (0.3.75).
    values = [TEXTS, [*NUMBERS[:4], None]][choose.random() < 0.2]
    return {"__value__": [choose.choice(values) for _ in range(choose.randint(0, 4))]}


def sentences_of(error: ComfyError) -> list[str]:
    """Our own sentences in what ComfyUI answered; its own checks have their own words."""
    if isinstance(error, NodeFailed):
        return [error.node_message]
    assert isinstance(error, PromptRejected), error
    reports = [e for n in error.node_errors.values() for e in n["errors"]]
    return [e["details"].split(" - ", 1)[-1] for e in reports if e["type"] == "custom_validation_failed"]


def is_clean(message: str) -> bool:
    one_line = "\n" not in message.strip() and "Traceback" not in message
    return one_line and bool(re.search(r"; needed: .+\. .+\.", message))


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["LoadSubjectImages", "GenerateClassPriors"])
def test_random_inputs(comfy: ComfyClient, kind: str) -> None:
    print(f"SUBJECTBOOTH_FUZZ_SEED={SEED}")
    choose = random.Random(SEED)
    refused_files(comfy.server.input_dir)
    base = comfy.server.input_dir.parent
    ours = {comfy.server.input_dir, comfy.server.output_dir, base / "temp", base / "user"}
    before = {p for p in files_below(base) if not any(p.is_relative_to(folder) for folder in ours)}
    inputs_before = files_below(comfy.server.input_dir)
    outcomes = {"ran": 0, "refused by us": 0, "refused by ComfyUI": 0}
    for number in range(CASES):
        if kind == "LoadSubjectImages":
            graph: Graph = subject_graph(images="ok.png")
            target = graph["1"]["inputs"]
            names = [name for name in target if name not in ("image", "mask")]
        else:
            graph = priors_graph(comfy, count=1, steps=1, seed=3000)
            target = graph["20"]["inputs"]
            inputs_before |= files_below(comfy.server.input_dir)
            # Huge but allowed counts and steps are honest work, not errors.
            names = [name for name in target if name not in ("model", "clip", "vae", "subject", "count", "steps")]
        changed = {name: strange_value(choose) for name in choose.sample(names, choose.choice((1, 1, 1, 2, 3)))}
        if kind == "GenerateClassPriors" and isinstance(changed.get("batch_size"), int | float):
            changed["batch_size"] = min(changed["batch_size"], 4)
        target.update(changed)
        try:
            comfy.run(graph, timeout=120)
            outcomes["ran"] += 1
        except (NodeFailed, PromptRejected) as error:
            sentences = sentences_of(error)
            for sentence in sentences:
                assert is_clean(sentence), (number, changed, sentence)
            outcomes["refused by us" if sentences else "refused by ComfyUI"] += 1
        except ComfyError as error:  # ComfyUI itself does not answer some values with a proper report
            assert comfy.server.alive(), (number, changed, error)
            outcomes["refused by ComfyUI"] += 1
        assert comfy.request("GET", "/queue") == {"queue_running": [], "queue_pending": []}, (number, changed)
    print(outcomes)
    assert outcomes["ran"] > CASES // 20 and outcomes["refused by us"] > CASES // 10, outcomes
    after = {p for p in files_below(base) if not any(p.is_relative_to(folder) for folder in ours)}
    assert {p for p in after - before if p.suffix not in (".log", ".db")} == set()
    assert files_below(comfy.server.input_dir) == inputs_before
    assert comfy.run({"1": node("ProbeState", nonce=choose.randint(0, 2**31))}).outputs["1"]
