"""What telling the panel costs a training."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from .predictions import pack_module


class ProbeFeed:
    """Gives a feed 10,000 steps, quicker than any training could; reports milliseconds and messages."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"nonce": ("INT", {"default": 0, "max": 2**31})}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, nonce: int) -> dict[str, Any]:
        import torch

        live, events = pack_module("nodes.live"), pack_module("trainer.events")
        path = pack_module("nodes.host").pack_output_dir() / f"feed_{nonce}"
        run = SimpleNamespace(folder=SimpleNamespace(path=path), stop_and_keep=lambda: None)
        times = []
        began = time.perf_counter()
        with live.feed("5:7", run, 10_000, torch.device("cpu")) as feed:
            for step in range(1, 10_001):
                event = events.StepDone(step, 10_000, 0.3, 0.2, 0.1, 1e-4, 0.5, 0.01, 1.0)
                start = time.perf_counter()
                feed.note(event)
                times.append(time.perf_counter() - start)
            feed.end("finished", {"step": 10_000})
        times.sort()
        report = {
            "seconds": time.perf_counter() - began, "mean_ms": 1e3 * sum(times) / len(times),
            "median_ms": 1e3 * times[len(times) // 2], "p99_ms": 1e3 * times[int(len(times) * 0.99)],
            "still_active": live.active(path.name) is not None,
        }
        return {"ui": {"report": [report]}}


NODES = {"ProbeFeed": ProbeFeed}
