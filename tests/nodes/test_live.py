"""The panel's side of a training, without a browser: messages, the routes, and stop, keep and continue over the API."""

from __future__ import annotations

import http.client
import io
import json
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from subjectbooth.tests.comfy_server import ComfyClient, Event, NodeFailed, PromptRejected, RunResult
from subjectbooth.tests.nodes.fuzz_values import is_refused_as
from subjectbooth.tests.nodes.graphs import node
from subjectbooth.tests.nodes.training_graphs import train_and_sample, upload_cat

STEPS = 40


def _messages(events: list[Event]) -> list[dict[str, Any]]:
    return [event.data for event in events if event.type == "subjectbooth.train"]


def _run_and_stop(client: ComfyClient, graph: dict[str, Any], at_least: int = 3) -> RunResult:
    """Queue it, stop its training as the panel does, and wait for the whole graph."""
    since = len(client.events)
    prompt_id = client.queue(graph)
    client.wait_event(
        lambda event: event.type == "progress" and event.data.get("node") == "11" and event.data["value"] >= at_least,
        since=since,
        timeout=240,
    )
    (active,) = client.request("GET", "/subjectbooth/active")["runs"]
    assert (active["node"], active["state"], active["steps"]) == ("11", "training", STEPS)
    answer = client.request("POST", f"/subjectbooth/runs/{active['run']}/stop")
    assert answer["state"] == "stopping"
    entry = client.wait(prompt_id, 240)
    return RunResult(prompt_id, entry["outputs"], frozenset(), entry, client.events[since:])


def _trained_steps(result: RunResult) -> list[int]:
    # The bar is told where a run goes on before its first step, hence the values from the second on.
    return [event.data["value"] for event in result.of_type("progress") if event.data.get("node") == "11"][1:]


def _tensors(client: ComfyClient, name: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(client.server.models_dir / "loras" / f"{name}.safetensors")


def test_stop_and_keep_then_continue_is_an_uninterrupted_run(comfy: ComfyClient) -> None:
    images = upload_cat(comfy)

    def graph(seed: int, name: str = "kept", **train: Any) -> dict[str, Any]:
        return train_and_sample(images, seed=seed, steps=STEPS, output_name=name, learning_rate=0.0043, **train)

    stopped = _run_and_stop(comfy, graph(1))
    shown = stopped.outputs["11"]["subjectbooth"][0]
    step = shown["step"]
    assert 3 <= step < STEPS
    assert f"step {step} of {STEPS} (stopped and kept)" in stopped.outputs["11"]["text"][0]
    assert len(stopped.images("7")) == 1, "the graph goes on to sampling"
    assert (shown["lora"], shown["matched"], shown["trigger"]) == ("kept.safetensors", shown["layers"], "ohwx cat")
    messages = _messages(stopped.events)
    assert messages[0]["state"] == "preparing"
    assert (messages[-1]["state"], messages[-1]["result"]["step"], messages[-1]["node"]) == ("kept", step, "11")
    with safetensors.safe_open(comfy.server.models_dir / "loras" / "kept.safetensors", "pt") as file:
        assert file.metadata()["subjectbooth.step"] == str(step)
    kept = _tensors(comfy, "kept")

    # Nothing is trained again: not for another seed of the sampler, not after a restart.
    assert "11" in comfy.run(graph(2)).cached
    comfy.server.restart()
    again = comfy.run(graph(3))
    assert again.outputs["11"]["text"][0].startswith("reused")
    assert again.outputs["11"]["subjectbooth"][0]["step"] == step
    assert _trained_steps(again) == []

    going_on = comfy.run(graph(3, after_stop="continue"))
    assert min(_trained_steps(going_on)) == step + 1
    assert going_on.outputs["11"]["subjectbooth"][0]["step"] == STEPS
    assert "11" in comfy.run(graph(4, after_stop="continue")).cached
    finished = _tensors(comfy, "kept")

    # What is cached for "keep" is out of date now, and is not served.
    after = comfy.run(graph(3))
    assert after.outputs["11"]["subjectbooth"][0]["step"] == STEPS

    comfy.run(graph(5, "whole", force_retrain=True))
    whole = _tensors(comfy, "whole")
    assert all(torch.equal(whole[name], finished[name]) for name in whole)
    assert not all(torch.equal(whole[name], kept[name]) for name in whole)


def test_a_continued_run_can_be_stopped_and_then_continued_again(comfy: ComfyClient) -> None:
    """ComfyUI has a result for the same inputs in its cache: that of the stop."""
    graph = train_and_sample(
        upload_cat(comfy), seed=1, steps=STEPS, output_name="twice", learning_rate=0.0044, after_stop="continue"
    )
    stopped = _run_and_stop(comfy, graph)
    step = stopped.outputs["11"]["subjectbooth"][0]["step"]
    assert step < STEPS
    again = comfy.run(graph)
    assert min(_trained_steps(again)) == step + 1
    assert again.outputs["11"]["subjectbooth"][0]["step"] == STEPS


def _pictures(client: ComfyClient, result: RunResult, node_id: str) -> list[Image.Image]:
    return [_picture(client.view(**record)) for record in result.images(node_id)]


def _picture(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_a_chosen_step_is_the_result_without_training(comfy: ComfyClient) -> None:
    """Over the API: its bits are published and sampled with, the grid marks it, and taking it back is no training."""
    images = upload_cat(comfy)

    def graph(use_step: int, **train: Any) -> dict[str, Any]:
        made = train_and_sample(
            images,
            seed=1,
            steps=3,
            output_name="chosen",
            learning_rate=0.0046,
            validation_prompts="a photo of {subject}",
            validation_interval=2,
            use_step=use_step,
            **train,
        )
        made["20"] = node("PreviewImage", images=["11", 5])
        return made

    own = comfy.run(graph(0))
    folder = comfy.server.output_dir / "subjectbooth" / own.outputs["11"]["subjectbooth"][0]["run"]
    last = _tensors(comfy, "chosen")
    (grid,) = _pictures(comfy, own, "20")
    assert grid.tobytes() == _picture((folder / "validation" / "grid.png").read_bytes()).tobytes()
    assert grid.width > 192 and grid.height > 2 * 192, "two steps, one prompt"

    chosen = comfy.run(graph(2))
    assert [message["state"] for message in _messages(chosen.events)] == ["preparing", "using", "finished"]
    shown = chosen.outputs["11"]["subjectbooth"][0]
    assert _trained_steps(chosen) == [] and "Started" not in json.dumps(_messages(chosen.events))
    assert (shown["step"], shown["steps"], shown["why"], shown["lora"]) == (2, 3, "chosen", "chosen.safetensors")
    assert "step 2 of 3 (chosen by use_step)" in chosen.outputs["11"]["text"][0]
    assert json.loads((folder / "result.json").read_text("utf-8"))["chosen"] == {"3": 2}
    kept, published = safetensors.torch.load_file(folder / "lora_000002.safetensors"), _tensors(comfy, "chosen")
    assert all(torch.equal(kept[name], published[name]) for name in kept)
    assert not all(torch.equal(kept[name], last[name]) for name in kept)
    (before,), (after,) = _pictures(comfy, own, "7"), _pictures(comfy, chosen, "7")
    assert before.tobytes() != after.tobytes(), "it is sampled with"
    assert len(chosen.outputs["11"]["images"]) == 2, "the later steps can still be looked at"
    (marked,) = _pictures(comfy, chosen, "20")
    assert marked.height == grid.height and marked.tobytes() != grid.tobytes()
    history = comfy.request("GET", f"/subjectbooth/runs/{folder.name}/events")
    assert (history["saved"], history["step"], history["result"]["why"]) == ([2, 3], 3, "chosen")
    assert _messages(chosen.events)[-1]["state"] == "finished" and _messages(chosen.events)[-1]["step"] == 3
    assert "11" in comfy.run(graph(2)).cached

    since = len(comfy.events)
    with pytest.raises(NodeFailed) as failure:
        comfy.run(graph(1))
    told = comfy.wait_event(
        lambda event: event.type == "subjectbooth.train" and event.data["state"] == "failed", since=since, timeout=60
    ).data
    assert (told["step"], told["error"]) == (3, "use_step 1, but this run has not kept the LoRA of that step.")
    ended = {name: told[name] for name in ("state", "step", "error")}
    assert comfy.request("GET", f"/subjectbooth/runs/{folder.name}/events")["ended"] == ended
    assert is_refused_as(failure.value, "has not kept the LoRA of that step. "), failure.value
    assert is_refused_as(failure.value, "Use 2, the nearest, or 0 for the run's own result"), failure.value
    with pytest.raises(NodeFailed) as failure:
        comfy.run(graph(2, force_retrain=True))
    assert is_refused_as(failure.value, "force_retrain together with use_step 2"), failure.value

    back = comfy.run(graph(0))
    assert _trained_steps(back) == [] and back.outputs["11"]["subjectbooth"][0]["why"] == "last"
    assert all(torch.equal(value, last[name]) for name, value in _tensors(comfy, "chosen").items())
    assert _pictures(comfy, back, "7")[0].tobytes() == before.tobytes()
    assert not list((comfy.server.models_dir / "loras").glob("chosen_*"))


def test_an_unknown_after_stop_is_one_sentence(comfy: ComfyClient) -> None:
    with pytest.raises((NodeFailed, PromptRejected)) as failure:
        comfy.run(train_and_sample(upload_cat(comfy), after_stop="perhaps", output_name="never"), targets=["11"])
    assert is_refused_as(failure.value, "after_stop 'perhaps'. Required: keep or continue"), failure.value


def test_messages_are_few_and_the_log_has_every_step(comfy: ComfyClient) -> None:
    result = comfy.run(
        train_and_sample(
            upload_cat(comfy),
            seed=1,
            steps=24,
            output_name="told",
            learning_rate=0.0045,
            validation_prompts="a photo of {subject}",
            validation_interval=10,
        )
    )
    told = [event for event in result.events if event.type == "subjectbooth.train"]
    seconds = told[-1].time - told[0].time
    at_once = 9  # preparing, started, three of pictures, what is done at once with them, finished, the file
    assert len(told) <= seconds / 0.3 + at_once
    messages = _messages(told)
    run = messages[0]["run"]
    assert {message["run"] for message in messages} == {run}
    last = messages[-1]
    assert (last["state"], last["step"], last["steps"]) == ("finished", 24, 24)
    assert last["memory"]["used"] > 2**27
    live = [point for message in messages for point in message["series"].get("loss", [])]
    history = comfy.request("GET", f"/subjectbooth/runs/{run}/events")
    assert [step for step, _ in history["series"]["loss"]] == list(range(1, 25))
    assert live == history["series"]["loss"]
    assert set(history["series"]) == {"loss", "subject"}, "no class images, no curve of the class"
    assert history["saved"] == [10, 20, 24]
    assert [validation["step"] for validation in history["validations"]] == [10, 20, 24]
    sent = [validation for message in messages for validation in message.get("validations", [])]
    assert sent == history["validations"]
    images = [image for shown in sent for image in shown["images"]]
    assert all(image["v"] and comfy.view(**image)[:4] == b"\x89PNG" for image in images)
    # Drawn anew under its name (for other prompts, say), a picture is another one for a browser.
    path = comfy.server.output_dir / images[0]["subfolder"] / images[0]["filename"]
    path.write_bytes(path.read_bytes())
    drawn = comfy.request("GET", f"/subjectbooth/runs/{run}/events")["validations"]
    assert drawn[0]["images"][0]["v"] != sent[0]["images"][0]["v"]
    assert drawn[1:] == sent[1:]
    assert history["active"] is None and history["kept"] is None
    assert history["result"]["lora"] == "told.safetensors"
    assert history["chosen"]["precision"] == "fp32"
    since = comfy.request("GET", f"/subjectbooth/runs/{run}/events?since=20")
    assert [step for step, _ in since["series"]["subject"]] == [21, 22, 23, 24]


@pytest.mark.parametrize("kind", ["steps", "all"])
def test_ten_thousand_events_are_a_few_messages_a_second(comfy: ComfyClient, kind: str) -> None:
    """Pictures and changes do not wait like steps do, but are no more than a few a second either."""
    since = len(comfy.events)
    graph = {"1": node("ProbeFeed", nonce=["steps", "all"].index(kind), kind=kind)}
    report = comfy.run(graph).outputs["1"]["report"][0]
    print(f"an event ({kind}): {report['mean_ms']:.4f} ms in the mean, {report['p99_ms']:.4f} at the 99th percentile")
    assert report["mean_ms"] < 1 and report["median_ms"] < 1
    assert not report["still_active"]
    told = [event for event in comfy.events[since:] if event.type == "subjectbooth.train"]
    assert len(told) <= 5 + report["seconds"] / 0.3 * (1 if kind == "steps" else 2)
    messages = _messages(told)
    assert all(len(points) <= 40 for message in messages for points in message["series"].values())
    if kind == "steps":
        assert max(len(json.dumps(message)) for message in messages) < 8000
    else:  # late, but none is lost
        shown = [validation["step"] for message in messages for validation in message.get("validations", [])]
        assert shown == list(range(1, 10_001))


def test_a_full_message_costs_less_than_a_millisecond(comfy: ComfyClient) -> None:
    """The training that hands it over, and the server that makes JSON of it, each."""
    report = comfy.run({"1": node("ProbeMessage", nonce=1)}).outputs["1"]["report"][0]
    for part, times in report.items():
        print(
            f"{part} a message: {times['median_ms']:.4f} ms in the median, {times['p99_ms']:.4f} ms at the 99th "
            "percentile"
        )
        assert times["median_ms"] < 1


def test_a_feed_tells_its_phases_and_how_it_ended(comfy: ComfyClient) -> None:
    report = comfy.run({"1": node("ProbePhases", nonce=1)}).outputs["1"]["report"][0]
    states = {name: told["states"] for name, told in report.items()}
    part = [1, 8]
    assert states["trained"] == [
        ["preparing", 2], ["studying", 2, [3, 64]], ["training", 3, [3, 64]], ["drawing", 3, part],
        ["saving", 10_000, part], ["finished", 10_000, part],
    ]  # fmt: skip
    assert states["reused"] == [["preparing", 2], ["reusing", 10_000], ["finished", 10_000]]
    assert states["chosen"] == [["preparing", 2], ["using", 10_000, 6], ["finished", 10_000, 6]]
    assert states["failed"][-1] == ["failed", 4, [3, 64], "Inference tensors cannot be saved."]
    assert states["cancelled"][-1] == ["cancelled", 4, part, ""]
    assert report["failed"]["ended"] == {"state": "failed", "step": 4, "error": "Inference tensors cannot be saved."}
    assert report["again"]["ended"]["error"] == "x" * 119 + "…"
    assert report["nameless"]["ended"]["error"] == "ValueError"
    assert report["cancelled"]["ended"] == {"state": "cancelled", "step": 4, "error": ""}
    assert report["trained"]["ended"] is None and report["cancelled_then_trained"]["ended"] is None


def _raw(client: ComfyClient, method: str, path: str) -> tuple[int, Any]:
    """Status and answer (None when it is no JSON). The path goes out as it is written: urllib would tidy it up."""
    address = urllib.parse.urlsplit(client.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host=False)
        connection.putheader("Content-Length", "0")
        connection.endheaders()
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if answer.getheader("Content-Type", "").startswith(
            "application/json"
        ) else None
    finally:
        connection.close()


@pytest.fixture(scope="module")
def traps(_comfy_client: ComfyClient, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that nobody may read: outside, and links to them from inside."""
    assert _comfy_client.server is not None
    runs = _comfy_client.server.output_dir / "subjectbooth"
    outside = tmp_path_factory.mktemp("outside") / "secret"
    for folder in (outside, runs / "half", runs / "whole"):
        folder.mkdir(parents=True)
        (folder / "run.json").write_text('{"trigger": "SECRET", "config": {"steps": 5}}', encoding="utf-8")
        (folder / "events.jsonl").write_text(
            '{"event": "StepDone", "step": 1, "loss": 0.5, "instance_loss": 0.5}\nnot JSON\n', encoding="utf-8"
        )
    try:
        (runs / "link").symlink_to(outside, target_is_directory=True)
        (runs / "alias").symlink_to(runs / "whole", target_is_directory=True)
        (runs / "half" / "events.jsonl").unlink()
        (runs / "half" / "events.jsonl").symlink_to(outside / "events.jsonl")
    except OSError:
        pytest.skip("no right to make links here")
    (runs.parent / "beside").mkdir(exist_ok=True)
    (runs.parent / "beside" / "run.json").write_text('{"trigger": "SECRET"}', encoding="utf-8")
    return outside


NAMES = [
    "..", ".", "%2e%2e", "..%2fbeside", "..%2Fbeside", "..%5cbeside", "%2e%2e%2fbeside", "..%252fbeside", "%2fetc",
    "%2Fetc%2Fpasswd", "/etc", "//etc", "C:%5CWindows", "C:", "c:x", "%5c%5chost%5cshare", "whole%2f", "whole%2f.",
    "whole%2f..%2fwhole", "./whole", "x%00y", "whole%00", "%0d%0aX-Evil:1", "link", "alias", "half", "no_such_run",
    "class_images", ".lock", "~", "x" * 300, "%ff%fe", "con", "nul", "whole.", "%20whole", "%F0%9F%90%B6", "*",
    "whole%3f",
]  # fmt: skip
UNROUTED = ("..", ".", "%2e%2e", "/etc", "//etc", "./whole", "%0d%0aX-Evil:1", "%ff%fe")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_never_leads_out_of_the_runs(comfy: ComfyClient, traps: Path, name: str) -> None:
    for prefix in ("/subjectbooth", "/api/subjectbooth"):
        for method, what in (("GET", "events"), ("POST", "stop")):
            status, answer = _raw(comfy, method, f"{prefix}/runs/{name}/{what}")
            if name in UNROUTED:  # not one part of a path: ComfyUI answers that itself
                assert status in (400, 404, 405), (status, answer)
                continue
            assert status in (400, 404), (status, answer)
            assert set(answer) == {"error"} and isinstance(answer["error"], str)
            assert "SECRET" not in answer["error"] and str(traps.parent) not in answer["error"]


def test_wrong_methods_and_wrong_questions_are_json_too(comfy: ComfyClient, traps: Path) -> None:
    expected = [
        ("GET", "/subjectbooth/runs/whole/events", 200), ("POST", "/subjectbooth/runs/whole/events", 405),
        ("DELETE", "/subjectbooth/runs/whole/events", 405), ("PUT", "/subjectbooth/active", 405),
        ("GET", "/subjectbooth/runs/whole/stop", 405), ("POST", "/subjectbooth/runs/whole/stop", 409),
        ("GET", "/subjectbooth/runs/whole/events?since=-1", 400),
        ("GET", "/subjectbooth/runs/whole/events?since=x", 400),
        ("GET", "/subjectbooth/runs/whole/events?since=" + "9" * 40, 400),
        ("GET", "/subjectbooth/runs/whole/events?since=1e3", 400), ("GET", "/subjectbooth/active?x=1", 200),
    ]  # fmt: skip
    for method, path, status in expected:
        found, answer = _raw(comfy, method, path)
        assert found == status, (method, path, answer)
        assert status == 200 or set(answer) == {"error"}
    # A damaged log gives what is left of it.
    _, history = _raw(comfy, "GET", "/subjectbooth/runs/whole/events")
    assert history["series"] == {"loss": [[1, 0.5]], "subject": [[1, 0.5]]}
    assert (history["step"], history["steps"]) == (1, 5)
