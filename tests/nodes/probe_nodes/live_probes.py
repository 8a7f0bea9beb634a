"""What telling the panel costs a training."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .predictions import pack_module


def _run(name: str) -> SimpleNamespace:
    """As much of a run as a feed asks for."""
    path = pack_module("nodes.host").pack_output_dir() / name

    def validation_paths(step: int, count: int) -> list[Path]:
        return [path / "validation" / f"step_{step:06d}_{number:02d}.png" for number in range(count)]

    folder = SimpleNamespace(
        path=path, validation_paths=validation_paths, lora_path=lambda step: path / f"lora_{step}.safetensors"
    )
    return SimpleNamespace(folder=folder, stop_and_keep=lambda: None, trained_steps=10_000)


def _milliseconds(times: list[float]) -> dict[str, float]:
    times = sorted(times)
    return {
        "mean_ms": 1e3 * sum(times) / len(times),
        "median_ms": 1e3 * times[len(times) // 2],
        "p99_ms": 1e3 * times[int(len(times) * 0.99)],
    }


class ProbeFeed:
    """Gives a feed 10,000 steps, quicker than any training could; reports milliseconds.

    "steps": only them. "all": with pictures, checkpoints and changes after each, as no training has them.
    """

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"nonce": ("INT", {"default": 0, "max": 2**31}), "kind": (["steps", "all"],)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, nonce: int, kind: str) -> dict[str, Any]:
        import torch

        live, events = pack_module("nodes.live"), pack_module("trainer.events")
        run = _run(f"feed_{nonce}")
        images, times = torch.zeros(1, 8, 8, 3), []
        began = time.perf_counter()
        with live.feed({"node": "5:7", "workflow": ""}, run, 10_000, torch.device("cpu")) as feed:
            for step in range(1, 10_001):
                told = [
                    events.StepDone(step, 10_000, 0.3, {"instance_loss": 0.2, "prior_loss": 0.1}, 1e-4, 0.5, 0.01, 1.0)
                ]
                if kind == "all":
                    told += [
                        events.ValidationStep(step, 1, 2),
                        events.Validation(step, ("a photo",), images),
                        events.CheckpointSaved(step, run.folder.path),
                        events.Adjusted(step, "less", {"a": "b"}),
                    ]
                for event in told:
                    start = time.perf_counter()
                    feed.publish(event)
                    times.append(time.perf_counter() - start)
            feed.end("finished", {"step": 10_000})
        report = {
            **_milliseconds(times),
            "seconds": time.perf_counter() - began,
            "still_active": live.active(run.folder.path.name) is not None,
        }
        return {"ui": {"report": [report]}}


class _Probe:
    """A node that runs anew with each number."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"nonce": ("INT", {"default": 0, "max": 2**31})}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"


class ProbeMessage(_Probe):
    """What one whole message costs the training that sends it, and the server that makes JSON of it."""

    def probe(self, nonce: int) -> dict[str, Any]:
        import torch

        live, events = pack_module("nodes.live"), pack_module("trainer.events")
        feed = live.Feed({"node": "5:7", "workflow": ""}, _run(f"message_{nonce}"), 10_000, torch.device("cpu"))
        feed.send()
        sending, encoding, step = [], [], 0
        for _ in range(1000):
            for _ in range(live.MOST_POINTS):  # a full message, as the quickest training sends it
                step += 1
                feed._sent = time.monotonic()
                feed.publish(
                    events.StepDone(step, 10_000, 0.3, {"instance_loss": 0.2, "prior_loss": 0.1}, 1e-4, 0.5, 0.01, 1.0)
                )
            series = {name: list(points) for name, points in feed._series.items()}
            time.sleep(0.002)  # the server has sent the last one: they never come one right after the other
            start = time.perf_counter()
            feed.send()
            sending.append(time.perf_counter() - start)
            start = time.perf_counter()
            json.dumps({**feed.state(), "series": series})
            encoding.append(time.perf_counter() - start)
        return {"ui": {"report": [{"sending": _milliseconds(sending), "encoding": _milliseconds(encoding)}]}}


class ProbePhases(_Probe):
    """The states of a feed: what it says after each event of a training, and how that ends with an error."""

    def probe(self, nonce: int) -> dict[str, Any]:
        import torch

        live, events, host = pack_module("nodes.live"), pack_module("trainer.events"), pack_module("nodes.host")
        report: dict[str, Any] = {}

        def training(name: str, told: list[Any], why: str, error: BaseException | None) -> None:
            run = _run(f"phases_{nonce}_{name}")
            run.folder.resumable_step, run.result = lambda steps: 4, SimpleNamespace(why=why, is_stopped=False)
            shown = []
            try:
                with live.feed({"node": "5:7", "workflow": ""}, run, 9, torch.device("cpu"), 2) as feed:
                    shown.append(feed.state())
                    for event in told:
                        feed.publish(event)
                        shown.append(feed.state())
                    if error is not None:
                        raise error
                    feed.end("finished")
            except BaseException as raised:
                if raised is not error:
                    raise
            keep = ("state", "step", "part", "used", "error")
            states = [[state[name] for name in keep if name in state] for state in [*shown, feed.state()]]
            report[name] = {"states": states, "ended": live.ended(run.folder.path.name)}

        finished = events.Finished(9, Path("x"), True)
        trained = [
            events.Studying(2, 3, 64),
            events.StepDone(3, 9, 0.3, {}, 1e-4, 0.5, 0.01, 1.0),
            events.ValidationStep(3, 1, 8),
            finished,
        ]
        training("trained", trained, "last", None)
        training("reused", [events.Finished(9, Path("x"), False)], "last", None)
        training("chosen", [events.Finished(6, Path("x"), False)], "chosen", None)
        failure = RuntimeError("Inference tensors cannot be saved. Please make\na clone.")
        training("failed", trained[:2], "last", failure)
        training("again", trained[:2], "last", RuntimeError("x" * 500))
        training("nameless", [], "last", ValueError())
        training("cancelled", trained[:3], "last", host.Cancelled())
        training("cancelled_then_trained", [], "last", host.Cancelled())
        training("cancelled_then_trained", [finished], "last", None)
        return {"ui": {"report": [report]}}


NODES = {"ProbeFeed": ProbeFeed, "ProbeMessage": ProbeMessage, "ProbePhases": ProbePhases}
