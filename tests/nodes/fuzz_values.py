"""Values that no input was made for, and what came of them."""

from __future__ import annotations

import random
import re
from typing import Any

from subjectbooth.tests.comfy_server import ComfyError, NodeFailed, PromptRejected

TEXTS = [
    "", " ", "dog", "{class}", "{token}", "{subject} {", "}{", "a (dog:1.5)", "embedding:x", "\\", "\0", "\ud800",
    "собака", "🐶" * 40, "x" * 5000, "..", "../..", "/etc/passwd", "C:\\x", "ok.png", "refused", "empty", "link",
    "with_link", "ok.png [output]", "ok.png [temp]", "%2e%2e%2f", "none", "null", "NaN", "\n", "a\nb", "{0.__class__}",
    "%s%n", "'; --", "0" * 64, "deadbeef", "<script>", "CON", "con.png", "~", ".", "./ok.png", "refused/ok.png",
    "an old man", "(toy) \\(x\\", "((", "for kohya", "torn.jpg",
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


def not_in_list(error: ComfyError) -> list[str]:
    """What newer ComfyUIs refuse by themselves, before any node is asked: "crop: 'x' not in [...]"."""
    reports = [e for n in getattr(error, "node_errors", {}).values() for e in n["errors"]]
    return [e["details"] for e in reports if e["type"] == "value_not_in_list"]


def is_refused_as(error: ComfyError, sentence: str) -> bool:
    """Whether our own sentence is in it, or, for a value outside of a list, ComfyUI's about that input and value."""
    given = re.match(r"(\w+) ('[^']*')\. Required|(\w+) ('[^']*')$", sentence)
    name, value = [part for part in given.groups() if part] if given else ("", "")
    return (
        any(sentence in one for one in refusals_of(error))
        or bool(name)
        and any(one.startswith(f"{name}: {value} not in") for one in not_in_list(error))
    )


def refusals_of(error: ComfyError) -> list[str]:
    """Our own sentences in what ComfyUI answered; its own checks have their own words."""
    if isinstance(error, NodeFailed):
        return [error.node_message]
    assert isinstance(error, PromptRejected), error
    reports = [e for n in error.node_errors.values() for e in n["errors"]]
    return [e["details"].split(" - ", 1)[-1] for e in reports if e["type"] == "custom_validation_failed"]
